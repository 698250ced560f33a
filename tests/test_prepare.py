"""The scripts that prepare the other data sets, in their small local variants, from text to fine-tuning."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from pcfg.common.files import read_json
from pcfg.lookup import LookupTable
from pretraining.data.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]


def prepare(script, folder, **forked):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **forked, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    command = ["bash", f"scripts/{script}.sh", "--small", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def measured(folder, done):
    """The loss and trace of the trained model, after a check that all parts have run."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "importing function" not in done.stderr  # bash would fall back to processes of their own
    model = folder / "models" / "small" / "step0000020"
    assert 0.3 < read_json(model / "finetune_sst2.json")["value"] <= 1
    assert (folder / "report" / "report.html").is_file()
    loss, trace = (read_json(model / f"{name}.json") for name in ("loss", "hessian"))
    assert trace["value"] > 0 and trace["standard_error"] > 0 and loss["standard_error"] > 0
    return loss


def test_opt(forks, tmp_path):
    loss = measured(tmp_path, prepare("prepare_opt", tmp_path, **forks.environment()))
    table = LookupTable.open(tmp_path / "data" / "lookup.hdf5")
    entropy = table.mean_entropy().by_pairs()[0]
    assert loss["entropy"]["pairs"]["mean"] == pytest.approx(entropy, abs=1e-6)
    assert loss["gap"]["pairs"]["mean"] > 0 and entropy < 0.999 * len(table.words)


@pytest.mark.parametrize("kind", ["openwebtext", "bookcorpus"])
def test_corpora(kind, forks, tmp_path):
    done = prepare(f"prepare_{kind}", tmp_path, **forks.environment())
    loss = measured(tmp_path, done)
    assert "no exact entropy" in done.stdout
    assert 2 < loss["value"] < 8 and "entropy" not in loss
    assert Vocabulary.read(tmp_path / "data" / "vocab.txt").size == 1000
