"""The benchmark of exact conditionals: its table comes out, and its baseline agrees with the engine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_comes_out(tmp_path):
    command = ["bash", ROOT / "scripts" / "benchmark.sh", "opt", "--scale", "0.01", "--only", "tiny", "--output"]
    done = subprocess.run([*command, tmp_path / "table.md"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    [line] = [line for line in table.splitlines() if line.startswith("| exact conditionals")]
    _, _, rate, baseline, ratio, goal, reached = (cell.strip() for cell in line.split("|")[1:-1])
    assert goal == "20x" and reached in ("yes", "no")
    rate, baseline, ratio = (float(cell.replace(",", "").removesuffix("x")) for cell in (rate, baseline, ratio))
    assert ratio == pytest.approx(rate / baseline, rel=0.02)
    assert float(re.search(r"differ by (\S+) at most", table)[1]) < 1e-4
