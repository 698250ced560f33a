"""Jobs on processes, threads and Ray: the same results, clear errors, and nothing that runs on when nobody waits for it."""

import argparse
import concurrent.futures
import functools
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pcfg.common import files
from pcfg.common.executors import add_executor_arguments, end_if_asked, executor_options, run_jobs
from pcfg.common.files import InputError
from pcfg.common.text import read_texts
from pretraining.sources.text_shards import Shard, TextFolder

ROOT = Path(__file__).parents[3]
LOCAL = [("processes", 1), ("processes", 2), ("threads", 2)]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see which processes run")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Let two workers start on a machine of one core as well."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def options(*flags):
    parser = argparse.ArgumentParser()
    add_executor_arguments(parser)
    return executor_options(parser.parse_args(flags), local="threads")


def test_the_flags_become_the_arguments_of_run_jobs():
    assert options() == {"n_processes": 2, "executor": "threads", "ray_address": None}
    asked = options("--n_processes", "7", "--executor", "ray", "--ray-address", "10.0.0.1:6379")
    assert asked == {"n_processes": 7, "executor": "ray", "ray_address": "10.0.0.1:6379"}
    with pytest.raises(InputError, match="--ray-address auto: only --executor ray connects to a cluster"):
        options("--ray-address", "auto")


@pytest.mark.parametrize(("executor", "n_processes"), LOCAL)
def test_every_job_gives_its_result(executor, n_processes, capsys):
    jobs = list(range(20))
    found = list(run_jobs(functools.partial(divmod, 100), jobs[1:], n_processes, "divisions", executor))
    assert sorted(found) == [(job, divmod(100, job)) for job in jobs[1:]]
    assert "divisions: 100%" in (progress := capsys.readouterr().err) and "19/19" in progress


@pytest.mark.parametrize("executor", ["processes", "threads", "ray"])
def test_no_jobs_are_no_work(executor, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # not even needed
    assert list(run_jobs(math.factorial, [], 2, "nothing", executor)) == []


@pytest.mark.parametrize(("executor", "n_processes"), LOCAL)
def test_a_workers_exception_is_passed_on(executor, n_processes):
    with pytest.raises(ValueError, match="factorial"):
        list(run_jobs(math.factorial, [3, -1, *range(100)], n_processes, "factorials", executor))


@pytest.mark.parametrize(("executor", "n_processes"), LOCAL)
def test_a_workers_input_error_keeps_its_message(executor, n_processes, tmp_path):
    with pytest.raises(InputError, match="missing.txt: no such file"):
        list(run_jobs(read_texts, [tmp_path / "missing.txt"] * 2, n_processes, "texts", executor))


def end_abruptly(job):
    os._exit(job)


def test_a_killed_worker_is_said_so():
    with pytest.raises(InputError, match="files: a worker process was killed.*--n_processes"):
        list(run_jobs(end_abruptly, [1, 2, 3], 2, "files"))


def test_results_come_while_others_are_worked_on():
    jobs = run_jobs(time.sleep, [0.0, 30.0, 30.0], 1, "naps")
    assert next(jobs) == (0.0, None)
    jobs.close()


@pytest.mark.parametrize("pool", ["ProcessPoolExecutor", "ThreadPoolExecutor"])
@pytest.mark.parametrize(("n_processes", "cores", "number"), [(1, 8, 1), (2, 8, 2), (8, 2, 2), (8, 8, 3), (8, None, 1)])
def test_workers_are_at_most_jobs_and_cores(monkeypatch, pool, n_processes, cores, number):
    """Counted without starting them; one worker is this process."""
    asked = []

    def refuse(workers, *_, **__):
        asked.append(workers)
        raise ZeroDivisionError

    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(concurrent.futures, pool, refuse)
    executor = {"ProcessPoolExecutor": "processes", "ThreadPoolExecutor": "threads"}[pool]
    try:
        assert len(list(run_jobs(math.sqrt, [1, 2, 3], n_processes, "roots", executor))) == 3
    except ZeroDivisionError:
        assert asked == [number]
    else:
        assert number == 1 and not asked


def test_threads_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=30)

    def meet(_):
        return meeting.wait()

    assert sorted(place for _, place in run_jobs(meet, ["a", "b"], 2, "meetings", "threads")) == [0, 1]


def test_threads_end_when_nobody_waits_for_them():
    started, ended = threading.Semaphore(0), []

    def work(job):
        started.release()
        try:
            while job:
                end_if_asked()
                time.sleep(0.001)
        finally:
            ended.append(job)

    jobs = run_jobs(work, [0, 1, 2, 3, 4, 5], 2, "endless", "threads")
    assert next(jobs) == (0, None)
    started.acquire(), started.acquire(), started.acquire()  # 0, and two of the others
    jobs.close()
    assert sorted(ended) == [0, 1, 2]  # those that ran, and none of those that waited
    end_if_asked()  # does nothing elsewhere


# A spawned worker imports this file by its path, as it does with the project's scripts.
SLEEPERS = """\
import os, sys, time
from pathlib import Path

os.cpu_count = lambda: 2


def sleep(place):
    Path(place, str(os.getpid())).touch()
    time.sleep(120)


if __name__ == "__main__":
    from pcfg.common.cli import run_main
    from pcfg.common.executors import run_jobs

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


@needs_proc
def test_workers_end_when_their_parent_alone_is_killed(sleepers):
    parent, workers = sleepers
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(alive(worker) for worker in workers), 10)


@needs_proc
@pytest.mark.parametrize("whole_group", [False, True], ids=["parent alone", "as a terminal does"])
def test_an_interrupt_ends_the_work_at_once(sleepers, whole_group):
    parent, workers = sleepers
    (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=10) == 130
    assert not any(alive(worker) for worker in workers)
    errors = parent.stderr.read()
    assert errors.endswith("interrupted; run the same command again to resume\n") and "Traceback" not in errors


def test_work_that_nobody_waits_for_ends():
    jobs = run_jobs(time.sleep, [0.0, 0.0, 60.0, 60.0], 2, "naps")
    started = time.monotonic()
    assert next(jobs) == (0.0, None)
    jobs.close()
    assert time.monotonic() - started < 20


def killed_once(flags, job):
    """Ends its process the first time; which process that was is noted in the folder `flags`."""
    flag = flags / str(job)
    if job % 2 and not flag.exists():
        flag.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job, os.getpid()


def killed_always(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    """Ray on two workers of this machine, started once for the tests here as a caller of `run_jobs` may start it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (tests/requirements.txt)")
    with pytest.MonkeyPatch.context() as patch:
        # Set before Ray is imported, as pcfg.common.executors does: nothing is reported, only the loopback is used.
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


def test_ray_gives_the_results_of_every_job_though_workers_are_killed(cluster, tmp_path):
    jobs = list(range(6))
    found = list(run_jobs(functools.partial(killed_once, tmp_path), jobs, 2, "squares", "ray"))
    assert sorted((job, result) for job, (result, _) in found) == [(job, job * job) for job in jobs]
    workers = {job: worker for job, (_, worker) in found}
    killed = {int(flag.name): int(flag.read_text()) for flag in tmp_path.iterdir()}
    assert killed.keys() == {1, 3, 5} and all(killed[job] != workers[job] for job in killed)
    assert os.getpid() not in workers.values()
    assert cluster.is_initialized()  # what the caller started is left to the caller


def written_elsewhere(shard):
    """What a node answers that has written a shard into a folder of its own."""
    return {"size": 5, "sha256": "0" * 64, "sentences": shard.sentences}


def test_a_file_that_another_node_made_in_its_own_folder_is_missed(cluster, tmp_path, monkeypatch):
    assert cluster.is_initialized()
    monkeypatch.setattr(files, "SIGHT", (0.1,))
    for content in (None, "cut"):
        text = TextFolder(tmp_path, {}, [Shard("training", 0, 1)], overwrite=False)
        if content is not None:
            (tmp_path / "training0.txt").write_text(content)
        with pytest.raises(InputError, match=r"/training0.txt: was made elsewhere and is not here; all machines need the same"):
            text.write_shards(written_elsewhere, n_processes=2, executor="ray")
        assert not (tmp_path / "manifest_pretraining.json").exists()


def test_errors_of_jobs_on_ray_are_the_jobs_own(cluster, tmp_path):
    assert cluster.is_initialized()
    with pytest.raises(InputError) as refused:
        list(run_jobs(read_texts, [tmp_path / "missing.txt"], 2, "texts", "ray"))
    assert str(refused.value) == f"{tmp_path / 'missing.txt'}: no such file"
    with pytest.raises(InputError, match="the worker of a Ray task was killed 4 times, possibly because memory ran out"):
        list(run_jobs(killed_always, [1], 2, "files", "ray"))


def test_work_on_ray_that_nobody_waits_for_ends(cluster):
    assert cluster.is_initialized()
    jobs = run_jobs(time.sleep, [0.0, 60.0, 60.0, 60.0], 2, "naps", "ray")
    started = time.monotonic()
    assert next(jobs) == (0.0, None)
    jobs.close()
    # the cores are free again
    assert list(run_jobs(math.factorial, [5], 2, "factorials", "ray")) == [(5, 120)]
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("no-colon", "not HOST:PORT"),
        ("127.0.0.1:x", "not HOST:PORT"),
        ("127.0.0.1:123456789", "Connection refused|port must be 0-65535"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address, reason, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (tests/requirements.txt)")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match=f"--ray-address {address}: no Ray cluster to join there .*{reason}"):
        list(run_jobs(math.factorial, [1], 2, "factorials", "ray", address))


def test_a_port_that_is_not_rays_is_refused_at_once(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (tests/requirements.txt)")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def greet():
        with server.accept()[0] as connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(InputError, match=r"\(something else listens\); give HOST:PORT"):
            list(run_jobs(math.factorial, [1], 2, "factorials", "ray", f"127.0.0.1:{server.getsockname()[1]}"))


def test_the_versions_of_another_ray_are_in_its_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed (tests/requirements.txt)")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(*_, **__):
        raise ConnectionError("Failed to connect") from RuntimeError("Version mismatch:\n    Ray: 2.60.0\n    Python: 3.11.7\n")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InputError, match="Version mismatch: Ray: 2.60.0 Python: 3.11.7"):
        list(run_jobs(math.factorial, [1], 2, "factorials", "ray", "auto"))


def test_a_missing_ray_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="Ray is not installed; `pip install ray`"):
        list(run_jobs(math.factorial, [1], 2, "factorials", "ray"))


def test_ray_is_imported_only_when_asked_for():
    code = "import sys, math; from pcfg.common.executors import run_jobs; "
    code += "list(run_jobs(math.sqrt, [1, 2], 2, 'roots', 'threads')); "
    code += "print({'ray', 'numba'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
