"""Programs as forks of one process that has imported what they import: their start takes milliseconds and not seconds.

    python tests/fork_server.py serve SOCKET MODULE ...     imports the modules, then forks a child per request
    FORK_SERVER=SOCKET python tests/fork_server.py run ...  does what `python ...` does, in such a child

The child has the files 0 to 2, the folder, the environment and the arguments of the process that asks, and ends with its exit
code. SIGINT and SIGTERM are passed on to it.
"""

import json
import os
import signal
import socket
import struct
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ask(arguments: list[str]) -> int:
    """Run `python ARGUMENTS` in a child of the server; returns its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["FORK_SERVER"])
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [struct.pack("Q", len(request))], [0, 1, 2])
        connection.sendall(request)
        (child,) = struct.unpack("Q", connection.recv(8, socket.MSG_WAITALL))
        for number in SIGNALS:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        answer = connection.recv(4, socket.MSG_WAITALL)
    return struct.unpack("i", answer)[0] if len(answer) == 4 else 1


def serve(path: str, modules: list[str]) -> None:
    """Import the modules, then serve at the socket `path` until the process is ended."""
    import contextlib
    import importlib

    for module in modules:
        # A benchmark's dependency, or a module that a change has moved, only makes a start slower.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path + ".new")
        listener.listen()
        os.rename(path + ".new", path)  # whoever sees the socket can connect to it
        handlers: set[int] = set()
        while True:
            connection, _ = listener.accept()
            if handler := os.fork():
                handlers = {child for child in handlers if os.waitpid(child, os.WNOHANG)[0] == 0} | {handler}
                connection.close()
            else:
                listener.close()
                handle(connection)


def handle(connection: socket.socket) -> None:
    """In a child of the server: run one request in a child of its own, and answer with its exit code."""
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    (size,) = struct.unpack("Q", head)
    arguments, folder, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        end(run(arguments, folder, environment))
    connection.sendall(struct.pack("Q", child))
    _, status = os.waitpid(child, 0)
    connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status) % 256))
    os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """What the interpreter does at its start, and the program; returns its exit code."""
    import runpy
    import traceback

    for number, mode in enumerate(("r", "w", "w")):
        stream = open(number, mode, buffering=1 if number == 2 else -1, closefd=False)
        setattr(sys, ("stdin", "stdout", "stderr")[number], stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            sys.modules.pop(arguments[1], None)  # runpy warns of a module that it runs and that is imported
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> None:
    """End the process as an interpreter does, without what only frees memory."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(ask(sys.argv[2:]))
    serve(sys.argv[2], sys.argv[3:])
