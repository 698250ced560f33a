"""Exit codes, argument types, and jobs on one process and on two."""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcfg.artefacts import InputError
from pcfg.cli import non_negative_int, positive_int, probability, run_jobs, run_main

ROOT = Path(__file__).parents[2]


def raising(exception):
    def main():
        raise exception

    return main


def test_an_input_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/script.py", "--flag"])
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(InputError("rules.txt:3: no such thing; give another")))
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.err == "script.py: error: rules.txt:3: no such thing; give another\n" and output.out == ""


def test_an_interrupt_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(KeyboardInterrupt()))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_success_and_mistakes_of_ours_are_left_alone():
    assert run_main(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))


@pytest.fixture(autouse=True)
def interruptible():
    """Let processes started here obey Ctrl-C: those of a shell's background job would inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def script(body, *arguments):
    return [sys.executable, "-c", f"from pcfg.cli import *\n{body}", *map(str, arguments)]


def test_a_process_ends_with_these_codes_and_no_traceback():
    fail = "def main():\n    raise InputError('value 7: too much')\nrun_main(main)"
    done = subprocess.run(script(fail), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "-c: error: value 7: too much\n")
    wait = "import time\ndef main():\n    print('on', flush=True)\n    time.sleep(60)\nrun_main(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(script(wait), cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted; run the same command again to go on\n")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "20": 20}, ["0", "-1"]),
        (non_negative_int, {"0": 0, "20": 20}, ["-1"]),
        (probability, {"0": 0.0, "1": 1.0, "0.15": 0.15}, ["-0.1", "1.1", "nan", "inf"]),
    ],
)
def test_argument_types(kind, good, bad, capsys):
    for text, value in good.items():
        assert kind(text) == value and type(kind(text)) is type(value)
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=kind)
    for text in (*bad, "x", ""):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--value={text}"])
        assert stopped.value.code == 2
        assert f"argument --value: {text}" in (errors := capsys.readouterr().err) or "argument --value: invalid" in errors


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Let two processes start on a machine of one core as well."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_every_job_gives_its_result(n_processes, capsys):
    jobs = list(range(20))
    found = list(run_jobs(math.factorial, jobs, n_processes, "factorials"))
    assert sorted(found) == [(job, math.factorial(job)) for job in jobs]
    assert "factorials: 100%" in (progress := capsys.readouterr().err) and "20/20" in progress


def test_no_jobs_are_no_work():
    assert list(run_jobs(math.factorial, [], 2, "nothing")) == []


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_workers_exception_is_passed_on(n_processes):
    with pytest.raises(ValueError, match="factorial"):
        list(run_jobs(math.factorial, [3, -1, *range(100)], n_processes, "factorials"))


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_workers_input_error_keeps_its_message(n_processes, tmp_path):
    from pcfg.text import read_texts

    with pytest.raises(InputError, match="missing.txt: no such file"):
        list(run_jobs(read_texts, [tmp_path / "missing.txt"] * 2, n_processes, "texts"))


def end_abruptly(job):
    os._exit(job)


@pytest.mark.usefixtures("two_cores")
def test_a_killed_worker_is_said_so():
    with pytest.raises(InputError, match="files: a worker process was killed.*--n_processes"):
        list(run_jobs(end_abruptly, [1, 2, 3], 2, "files"))


def test_results_come_while_others_are_worked_on():
    jobs = run_jobs(time.sleep, [0.0, 30.0, 30.0], 1, "naps")
    assert next(jobs) == (0.0, None)
    jobs.close()


@pytest.mark.parametrize(("n_processes", "cores", "number"), [(1, 8, 1), (2, 8, 2), (8, 2, 2), (8, 8, 3), (8, None, 1)])
def test_processes_are_at_most_jobs_and_cores(monkeypatch, n_processes, cores, number):
    """Counted without starting them; one process is this one."""
    asked = []

    def refuse(workers, *_, **__):
        asked.append(workers)
        raise ZeroDivisionError

    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", refuse)
    try:
        assert len(list(run_jobs(math.sqrt, [1, 2, 3], n_processes, "roots"))) == 3
    except ZeroDivisionError:
        assert asked == [number]
    else:
        assert number == 1 and not asked


# A spawned worker imports this file by its path, as it does with the project's scripts.
SLEEPERS = """\
import os, sys, time
from pathlib import Path

os.cpu_count = lambda: 2


def sleep(place):
    Path(place, str(os.getpid())).touch()
    time.sleep(120)


if __name__ == "__main__":
    from pcfg.cli import run_jobs, run_main

    run_main(lambda: list(run_jobs(sleep, [sys.argv[1]] * 4, 2, "naps")))
"""


def alive(process):
    """Whether a process runs; one that has ended and that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def sleepers(tmp_path):
    """A process with two workers at work: the process and the workers' numbers. All are ended at last."""
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    place = tmp_path / "workers"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "sleepers.py", place]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        wait_until(lambda: len(list(place.iterdir())) == 2)
        workers = [int(path.name) for path in place.iterdir()]
        assert parent.pid not in workers and all(alive(worker) for worker in workers)
        yield parent, workers
        for process in filter(alive, (parent.pid, *workers)):
            os.kill(process, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see which processes run")
def test_workers_end_when_their_parent_alone_is_killed(sleepers):
    parent, workers = sleepers
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(alive(worker) for worker in workers), 10)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see which processes run")
@pytest.mark.parametrize("whole_group", [False, True], ids=["parent alone", "as a terminal does"])
def test_an_interrupt_ends_the_work_at_once(sleepers, whole_group):
    parent, workers = sleepers
    (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=10) == 130
    assert not any(alive(worker) for worker in workers)
    errors = parent.stderr.read()
    assert errors.endswith("interrupted; run the same command again to go on\n") and "Traceback" not in errors


def test_work_that_nobody_waits_for_ends():
    jobs = run_jobs(time.sleep, [0.0, 0.0, 60.0, 60.0], 2, "naps")
    started = time.monotonic()
    assert next(jobs) == (0.0, None)
    jobs.close()
    assert time.monotonic() - started < 20
