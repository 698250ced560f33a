"""The README's first command, for a few steps, and again."""

import csv
import os
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


# Started as users do, once each; further commands with the same program are forks.
OWN_PROCESSES = (
    "*generate_downstream.py*--task-type A*",
    "*pcfg.lookup*",
    "*run_lp.py*--features*pcfg_A*",
    "*--job_name small *",
)


def run(folder, forked) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **forked, "QUICKSTART_STEPS": "30", "MASTER_PORT": str(port)}
    command = ["bash", "scripts/quickstart.sh", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "importing function" not in done.stderr  # bash would fall back to processes of their own
    return done.stdout


def test_from_text_to_report_and_again(forks, tmp_path):
    printed = run(tmp_path, forks.environment(*OWN_PROCESSES))
    table = (tmp_path / "report" / "results.csv").read_bytes()
    rows = {row["model"]: row for row in csv.DictReader(table.decode().splitlines())}
    names = [f"{size}/step{step:07d}" for size in ("small", "medium", "large") for step in (0, 10, 20, 30)]
    assert set(rows) == {*names, "lookup_table"}
    for name in names:
        assert all(float(rows[name][column]) > 0 for column in ("gap_sentences", "gap_sentences_se", "trace", "trace_se"))
        assert all(0.2 < float(rows[name][f"probe_pcfg_{task}"]) <= 1 for task in "ABC")
        assert 0.2 < float(rows[name]["finetune_pcfg_B"]) <= 1
        assert name in printed
        if name.endswith("0000"):
            assert float(rows[name]["gap_sentences"]) > 1
    assert float(rows["lookup_table"]["probe_pcfg_B"]) > 0.5 and "0 by construction" in printed
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = run(tmp_path, forks.environment())
    assert again.count("complete: ") == 3 and again.count("skipped") >= 2 * len(names)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == weights
    assert (tmp_path / "report" / "results.csv").read_bytes() == table
