"""One run at a time in a job's folder: the lock, what it says, and what it leaves."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pcfg.common.files import InputError
from pretraining.training import lock as locks
from pretraining.training.lock import lock

ROOT = Path(__file__).parents[2]
# Holds the lock until a line comes. Its children, one forked and one program, live on for a while.
HOLDER = """
import os, pathlib, subprocess, sys, time
from pretraining.training.lock import lock
with lock(pathlib.Path(sys.argv[1])):
    sleeper = subprocess.Popen(["sleep", "5"], close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    forked = os.fork()
    if forked == 0:
        os.close(1)
        time.sleep(5)
        os._exit(0)
    print(sleeper.pid, forked, flush=True)
    sys.stdin.readline()
"""
# Adds 1 to a number in a file outside of the folder, many times.
ADDS = """
import pathlib, sys, time
from pretraining.training.lock import lock
job, number = map(pathlib.Path, sys.argv[1:])
for _ in range(20):
    with lock(job):
        value = int(number.read_text())
        time.sleep(0.002)
        number.write_text(str(value + 1))
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `job`, and the pids of its children."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path / "out/job")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        yield process
        process.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_the_message_names_the_first(holder, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "WAIT", 0.3)
    who = rf"out/job: in use by process {holder.pid} on \S+, since [-\d]+ [\d:]+: \S*python\S* -c .*/out/job"
    with pytest.raises(InputError, match=who + "'?; wait for its end, or give another --job_name"):
        train(f"--output_dir {tmp_path}/out")
    assert re.search(who + "'?; waiting 0 s for its end", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "out/job").iterdir()] == [".lock"]


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_run_waits_for_one_that_is_ending_and_not_for_its_children(holder, tmp_path, capsys, how):
    end = holder.kill if how == "killed" else holder.stdin.close
    threading.Timer(0.5, end).start()
    with lock(tmp_path / "out/job"):
        assert f"in use by process {holder.pid}" in capsys.readouterr().out
        assert f"process {os.getpid()} on" in (tmp_path / "out/job/.lock").read_text()
    assert not (tmp_path / "out/job/.lock").exists()


def test_the_lock_excludes_others_although_its_file_comes_and_goes(tmp_path):
    number = tmp_path / "number"
    number.write_text("0")
    command = [sys.executable, "-c", ADDS, tmp_path / "out/job", number]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert number.read_text() == "80"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["number"]


def test_what_was_there_or_was_written_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out/job"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not list((tmp_path / "out").iterdir())
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "out/job"):
        (tmp_path / "out/job/file").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "out/job").iterdir()] == ["file"]


def test_a_refused_run_leaves_nothing(train, tmp_path):
    with pytest.raises(InputError):
        train("--model_name_or_path nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_file_systems_without_locks_get_a_warning(train, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert train("--max_steps 1").name == "step0000001"
    assert capsys.readouterr().out.count("no locks on this file system") == 1
