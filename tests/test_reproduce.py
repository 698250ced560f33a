"""All experiments at a tiny scale, through the real scripts, killed twice on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pretraining.report.contract import read_choice, read_experiments, read_statuses

ROOT = Path(__file__).parents[1]
DRIVER = """
import dataclasses, os, sys
sys.executable = os.environ["COMMANDS_PYTHON"]
from pretraining.experiments import reproduce
from pretraining.experiments.plan import SCALES, Size
SCALES["tiny"] = dataclasses.replace(
    SCALES["mini"], name="tiny", shards=1, sentences=1000, test_sentences=40, labelled=200, validation=100,
    sizes={"small": Size(16, 1, 1), "large": Size(32, 2, 2)}, base="small", batch=32, micro_batch=32, warmup=1, half_life=4,
    sgd_warmup=1, steps=4, checkpoints=(2, 4, 6), weights=(1.0,), adversarial_batch=32, trace_sentences=16,
    probe="--per_device_train_batch_size 64 --num_train_epochs 2 --learning_rate 1e-3 --seeds 0",
    finetune="--per_device_train_batch_size 64 --num_train_epochs 1 --learning_rate 1e-4",
)
reproduce.main(sys.argv[1:])
"""


def start(out, forks):
    words = ["all", "--scale", "tiny", "--seeds", "0", "--task", "B", "--jobs", "2", "--out", str(out)]
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


def test_all_experiments_killed_twice(forks, tmp_path):
    out = tmp_path / "out"
    kill_when(out / "models/small/seed0/step0000000", start(out, forks))
    kill_when(out / "models/large/seed0/step0000004/loss.json", start(out, forks))
    code, printed = finish(out, forks)
    states = {name: status.state for name, status in read_statuses(out).items()}
    choice = read_choice(out / "adversarial/choice.json")
    # In four steps the weight may or may not lower the accuracy; without a choice there are no adversarial runs.
    not_due = {name for name, state in states.items() if state == "not due"}
    assert not_due == (
        set() if choice.chosen else {name for name in states if name.endswith((" adversarial", "adversarial seed 0"))}
    )
    assert code == 0 and {state for name, state in states.items() if name not in not_due} == {"done"}, printed
    assert printed.count("done already") >= 2

    experiments = read_experiments(out)
    with open(out / "report/experiments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    entries = [(part.name, entry.group) for part in experiments.experiments for entry in part.entries]
    assert [(row["experiment"], row["group"]) for row in rows] == entries
    for row in rows:
        if row["group"] == "adversarial" and choice.chosen is None:
            continue
        assert float(row["probe_pcfg_B"]) > 0.1
        assert row["group"] == "lookup table" or float(row["trace"]) > 0
    assert json.loads((out / "report/results.json").read_text()) and (out / "report/report.html").stat().st_size > 50_000

    if os.environ.get("LONG_TESTS"):
        other = tmp_path / "other"
        assert finish(other, forks)[0] == 0
        for name in ("results.csv", "experiments.csv", "results.json"):
            assert (other / "report" / name).read_bytes() == (out / "report" / name).read_bytes()
