"""The benchmark of the exact loss: its baseline computes what the engine computes, and its table comes out."""

import importlib
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from pcfg.common.text import read_texts
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable
from pretraining.data.contexts import from_texts
from pretraining.evaluation.inputs import Truth
from pretraining.evaluation.loss import context_losses
from pretraining.model.checkpoints import load_model, load_vocabulary

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("max_length", [None, 10])
def test_the_baseline_agrees(tiny_model, tiny_data, tiny_rules, monkeypatch, max_length):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    naive = importlib.import_module("naive_loss")
    texts, vocabulary = read_texts(tiny_data / "test0.txt")[:20], load_vocabulary(tiny_model)
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    contexts, columns = from_texts(texts, vocabulary, "test0.txt"), np.array([vocabulary.ids[word] for word in table.words])
    expected = context_losses(load_model(tiny_model), contexts, Truth(table, columns))[1] + table.entropy
    model = AutoModelForMaskedLM.from_pretrained(tiny_model).eval()
    baseline = naive.SentenceBySentence(model, vocabulary.ids, table.words, max_length)
    found = [loss for row, text in enumerate(texts) for loss in baseline.losses(text, table.conditionals(row, row + 1))]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_table_comes_out(tmp_path):
    command = ["bash", ROOT / "scripts" / "benchmark.sh", "loss", "--scale", "0.002", "--only", "mini", "--output"]
    done = subprocess.run([*command, tmp_path / "table.md"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    [line] = [line for line in table.splitlines() if line.startswith("| exact loss")]
    _, unit, rate, baseline, ratio, goal, reached = (cell.strip() for cell in line.split("|")[1:-1])
    assert re.fullmatch(r"sentences/s on [12] cores", unit) and goal == "20x" and reached in ("yes", "no")
    rate, baseline, ratio = (float(cell.replace(",", "").removesuffix("x")) for cell in (rate, baseline, ratio))
    assert ratio == pytest.approx(rate / baseline, rel=0.02)
    assert float(re.search(r"differ by (\S+) nats", table)[1]) < 1e-5
