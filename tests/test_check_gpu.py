"""The check of a machine with a GPU: its table, its exit codes, and, with LONG_TESTS=1, all of it in small sizes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import check_gpu
from tests.check_gpu import Figure, near

PROGRAM = Path(check_gpu.__file__)


def test_without_a_gpu_it_says_so_in_one_line():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("check_gpu.py: error: no CUDA GPU on this machine (torch ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def checked(monkeypatch, tmp_path, capsys):
    """Runs fake checks; returns the exit code, the cells of the table and the last line."""

    def run(*checks):
        monkeypatch.setattr(check_gpu, "FIRST", lambda _: [])
        monkeypatch.setattr(check_gpu, "CHECKS", checks)
        code = 0
        try:
            check_gpu.main(["--rehearsal", "--folder", str(tmp_path)])
        except SystemExit as end:
            code = end.code
        lines = capsys.readouterr().out.splitlines()
        return code, [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:], lines[-1]

    return run


def right(_):
    return [near("loss", 2.0004, 2, 1e-3)]


def wrong(_):
    return [near("loss", 2.1, 2, 1e-3), near("trace", float("nan"), 7, 1e-3), Figure("kernel", "flash", "flash", True)]


def broken(_):
    raise ValueError("no | such kernel\nof all")


def slow(work):
    program = work.folder / "sleep.py"
    program.write_text("import time; time.sleep(99)")
    work.run({"sleep": ("cpu", str(program))})


def failing(work):
    program = work.folder / "fail.py"
    program.write_text("import sys; print('loading'); sys.exit('no such file')")
    work.succeed({"program": ("cpu", str(program))})


def test_a_table_of_figures_as_expected(checked):
    code, rows, last = checked(right)
    assert code == 0
    assert rows == [["right", "loss", "2 ± 0.001", "2.0004", "ok"]]
    assert last.startswith("ok: all figures are as expected (")


def test_a_figure_or_a_check_that_fails_fails_the_whole_and_stops_nothing(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(check_gpu, "OF_ONE", 0.1)  # ten times as much in a rehearsal
    code, rows, last = checked(broken, wrong, slow, right)
    assert code == 1
    assert rows == [
        ["broken", "", "no error", "ValueError: no / such kernel", "FAILED"],
        ["wrong", "loss", "2 ± 0.001", "2.1", "FAILED"],
        ["wrong", "trace", "7 ± 0.001", "nan", "FAILED"],
        ["wrong", "kernel", "flash", "flash", "ok"],
        ["slow", "", "no error", "TimeoutError: not finished within 1 s", "FAILED"],
        ["right", "loss", "2 ± 0.001", "2.0004", "ok"],
    ]
    assert last.startswith("FAILED: broken, wrong, slow (") and last.endswith(f"logs are in {tmp_path}")


def test_a_program_that_fails_is_named_with_the_last_line_that_it_printed(checked):
    code, (row,), _ = checked(failing)
    assert code == 1
    assert row[3] == "RuntimeError: program: exit code 1, no such file"


@pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="minutes; LONG_TESTS=1")
def test_all_checks_run_in_small_sizes_on_the_cpu():
    done = subprocess.run([sys.executable, PROGRAM, "--rehearsal"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert all(check.__name__ in done.stdout for check in check_gpu.CHECKS)
