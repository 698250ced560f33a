"""The benchmark of natural text: its baseline makes the samples that we make, and its table comes out."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import generate_samples
from pretraining.data.samples import read_samples
from pretraining.data.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]


def test_the_baselines_agree(documents, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    naive = importlib.import_module("naive")
    flags = ["--dir", documents, "-o", tmp_path, "--max_seq_length", 64, "--short_seq_prob", 0, "--n_processes", 1]
    generate_samples.main([*map(str, flags)])
    ours = read_samples(tmp_path / "train_shard_0.hdf5")
    words = documents / "vocab.txt"
    for tokenizer in (BertTokenizer(vocab=Vocabulary.read(words).ids), BertTokenizerLegacy(vocab_file=str(words))):
        with open(documents / "training0.txt") as file:
            samples = list(naive.packed_documents(file, tokenizer, 64))
        naive.write_masked(tmp_path / "naive.hdf5", samples, tokenizer, 64, 10, 0.15)
        assert [len(sample) for sample in samples] == ours.input_mask.sum(1, dtype=int).tolist()
        restored = ours.input_ids.copy()
        for row in range(len(ours)):
            for position, word in zip(ours.masked_lm_positions[row], ours.masked_lm_ids[row], strict=True):
                restored[row, position] = word if position else restored[row, position]
        with open(documents / "training0.txt") as file:
            expected = list(naive.packed_documents(file, tokenizer, 64))
        assert [ids[: len(sample)].tolist() for ids, sample in zip(restored, expected, strict=True)] == expected


def test_the_table_comes_out(tmp_path):
    command = ["bash", ROOT / "scripts" / "benchmark.sh", "corpus", "--scale", "0.0005", "--output"]
    done = subprocess.run([*command, tmp_path / "table.md"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 5
    for what, _, rate, baseline, ratio, *_ in lines[2:4]:
        assert what.startswith("text to samples")
        rate, baseline, ratio = (float(cell.replace(",", "").removesuffix("x")) for cell in (rate, baseline, ratio))
        assert ratio == pytest.approx(rate / baseline, rel=0.02)
    assert re.search(r"\d MB, \d of them without repetition", table)
