"""A study at a tiny scale, through the real scripts, killed twice on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pretraining.experiments.study import read_decision, read_statuses, read_studies

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "tests/experiments/tiny.toml"
DRIVER = """
import os, sys
sys.executable = os.environ["COMMANDS_PYTHON"]
from pretraining.experiments.__main__ import main
main(sys.argv[1:])
"""


def start(out, forks):
    words = [str(STUDY), "--jobs", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMMANDS_PYTHON": str(forks.executable)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", DRIVER, *words], env=environment, **pipes)


def kill_when(path, process):
    """SIGKILL the runner once `path` is there."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, path
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(out, forks):
    with start(out, forks) as process:
        printed = process.communicate(timeout=900)[0]
    return process.returncode, printed


def test_a_study_killed_twice(forks, tmp_path):
    out = tmp_path / "out"
    kill_when(out / "selection/base/seed50/step0000000", start(out, forks))
    kill_when(out / "models/base/seed7/step0000004/loss.json", start(out, forks))
    code, printed = finish(out, forks)
    assert code == 0 and {status.state for status in read_statuses(out).values()} == {"done"}, printed
    assert printed.count("done already") >= 2
    studies = read_studies(out)
    assert len(studies.registrations) == 1 and studies.registrations[0].accuracies == 0
    decision = read_decision(out, "weight")
    assert decision.chosen in (0.1, 0.2) and decision.candidates[0].accuracy > 0.1
    for group in studies.groups.values():
        for folder in group.folders.values():
            records = {path.name for path in (out / folder).glob("*.json")}
            assert {"loss.json", "hessian.json", "curve_pcfg_A_ridge.json", "finetune_pcfg_A.json", "size.json"} <= records
            arguments = json.loads((out / folder / "args.json").read_text())["arguments"]
            weight = decision.chosen if group.name == "adversarial" else 0
            assert (arguments.get("adversarial_weight") or 0) == weight
    for path in studies.commands:
        assert (out / path).exists()
    assert (out / "report/report.html").stat().st_size > 10_000

    if os.environ.get("LONG_TESTS"):
        other = tmp_path / "other"
        assert finish(other, forks)[0] == 0
        tables = sorted(path.name for path in (out / "report").glob("*.csv"))
        assert tables
        for name in tables:
            assert (other / "report" / name).read_bytes() == (out / "report" / name).read_bytes(), name
