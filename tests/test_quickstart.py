"""The README's first command at the scale of tests: interrupted, resumed, and again."""

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

from pretraining.experiments.study import read_statuses, read_studies

ROOT = Path(__file__).parents[1]
# Whoever asks a network is refused here.
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
# The runner is a process of its own; the commands that it starts are forks.
RUNNER = """() {{ command python -c 'import sys; sys.executable = "{executable}"
from pretraining.experiments.__main__ import main
main(sys.argv[3:])' "$@"; }}"""


def start(folder, forks):
    environment = {**os.environ, **NOWHERE, "PYTHONPATH": str(ROOT), "QUICKSTART_SCALE": "test"}
    environment["BASH_FUNC_python%%"] = RUNNER.format(executable=forks.executable)
    command = ["bash", "scripts/quickstart.sh", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(folder, forks) -> str:
    with start(folder, forks) as process:
        printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed[-3000:]
    assert "importing function" not in printed  # bash would take the program of that name
    return printed


def interrupt_when(path, process):
    """Ctrl-C once `path` is there."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, path
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_from_text_to_report_and_again(forks, tmp_path):
    out = tmp_path / "out"
    model = out / "models/base/seed108/step0000020-cooled/model.safetensors"
    interrupt_when(model, start(out, forks))
    assert not (out / "report").exists()
    written = model.stat().st_mtime_ns
    printed = finish(out, forks)
    assert "train base: done already" in printed and model.stat().st_mtime_ns == written
    assert f"report:  {out}/report/report.html" in printed

    studies = read_studies(out)
    assert studies.registrations[0].accuracies == 0 and studies.scale == "test"
    assert {status.state for status in read_statuses(out).values()} == {"done"}
    table = (out / "report/results.csv").read_bytes()
    rows = {row["model"]: row for row in csv.DictReader(table.decode().splitlines())}
    models = [folder for group in studies.groups.values() for folder in group.folders.values()]
    assert len(models) == 4
    for name in models:
        row = rows[name]
        assert all(float(row[column]) > 0 for column in ("gap_sentences", "gap_sentences_se", "trace", "trace_se", "balanced"))
        assert all(0.2 < float(row[f"curve_pcfg_A_ridge_{labels}"]) <= 1 for labels in (100, 1000))
    assert {Path(path).parts[1] for path in studies.commands if path.startswith("controls/")} == {"words", "lookup"}
    for file, size in (("report.html", 30_000), ("overview.png", 10_000), ("comparisons.csv", 100)):
        assert (out / "report" / file).stat().st_size > size
    assert "not at the same loss" in (out / "report/comparisons.csv").read_text()  # 20 steps

    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = finish(out, forks)
    checked = ("text", "samples", "task A", "lookup table")  # by hashes
    for name in read_statuses(out):
        assert f"{name}: done {'in' if name in checked else 'already'}" in again
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == weights
    assert (out / "report/results.csv").read_bytes() == table
