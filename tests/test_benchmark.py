"""The benchmark prints its table, and its naive baselines compute what the engine computes."""

import importlib
import random
import re
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from nltk.grammar import Nonterminal
from nltk.parse import ViterbiParser

from pcfg.chart import Chart
from pcfg.common.text import read_texts
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.labels import Labeller
from pcfg.lookup import LookupTable
from pcfg.sampler import Sampler
from pretraining.data.contexts import from_texts
from pretraining.data.samples import DTYPES, read_samples
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.hessian import Sampling, measured_parameters
from pretraining.evaluation.inputs import Truth
from pretraining.evaluation.spectrum import hessian_operator
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model
from pretraining.model.config import ModelConfig
from pretraining.training.batches import Packing, masked_loss, micro_batch
from pretraining.training.engine import cpu_has_bfloat16
from tests.bert_tokenizer import build_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def naive():
    return imported("naive")


@pytest.fixture(scope="module")
def measure():
    return imported("measure")


def imported(name: str):
    """A module of tests/benchmarks, whose programs find each other as neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "benchmarks")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def drawn():
    """The mini grammar and sentences of it: as arrays and as words."""
    grammar = Grammar.read(RULES_FOLDER / "rule_mini_mlm.txt")
    tokens, lengths = Sampler(grammar, 31).sample(40, np.random.default_rng(5))
    words = [[grammar.words[word] for word in row[:length]] for row, length in zip(tokens, lengths, strict=True)]
    return grammar, (tokens, lengths), words


def benchmark(*arguments):
    return subprocess.run(
        ["bash", ROOT / "scripts" / "benchmark.sh", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_an_unknown_benchmark_is_one_line_that_lists_the_known():
    for arguments in (["pcgf"], []):
        done = benchmark(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"benchmark.sh: error: no benchmark '(pcgf)?'; give one of: .*\bpcfg\b.*\n", done.stderr)


def test_the_table_comes_out(tiny_rules, tmp_path):
    rows = "text labels conditionals samples deeper parses".split()
    done = benchmark(
        *("pcfg", "--rule-path", tiny_rules, "--scale", 0.0005, "--folder", tmp_path),
        *("--output", tmp_path / "table.md", "--only", *rows),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    assert re.match(r"tiny_rules.txt \(sha256 [0-9a-f]{12}\); .+, [12] cores used of \d+ \(load before: \d+\.\d\), 20", table)
    assert re.search(r", \d{4}-\d\d-\d\d; python 3\S+, numpy \d", table)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["what", "unit", "rate", "baseline", "ratio", "goal", "reached"]
    assert [what.split(",")[0] for what, *_ in lines[2:]] == [
        "text shards to disk",
        *["labels"] * 3,
        "masked conditionals",
        "conditionals reduced to entropy and log P",
        "masked HDF5 samples",
        "conditionals",
        "most probable parses",
    ]
    for _, _, rate, baseline, ratio, *_ in lines[2:]:
        rate, baseline, ratio = (float(cell.replace(",", "").removesuffix("x")) for cell in (rate, baseline, ratio))
        assert ratio == pytest.approx(rate / baseline, rel=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_the_table_of_probes_comes_out(tiny_rules, tmp_path):
    sizes = ("--scale", 0.006, "--hidden-size", 16, "--layers", 1, "--cores", 1)
    done = benchmark("probes", "--rule-path", tiny_rules, *sizes, "--output", tmp_path / "table.md")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == [
        "linear probe by AdamW",
        "its features",
        "its accuracy, difference",
        "linear probe by L-BFGS",
    ]
    assert lines[4][-1] == "yes |"  # the same accuracy as with the encoder in every step


def test_the_table_of_training_comes_out(tiny_rules, tmp_path):
    sizes = "--scale 0.01 --hidden-size 16 --layers 1 --heads 2 --batch 16 --cores 1 --dropout 0".split()
    done = benchmark("pretraining", "--rule-path", tiny_rules, *sizes, "--output", tmp_path / "t.md", "--only", "compact")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(" | ") for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ")]
    arithmetics = ["float32", "bfloat16"] if cpu_has_bfloat16() else ["float32"]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == [
        f"13 words, {arithmetic}, dropout 0, {what}"
        for arithmetic in arithmetics
        for what in ("plain loop", "sparse loop", "without DeepSpeed", "peak")
    ]
    assert all(float(line[2].replace(",", "")) > 0 and float(line[3].replace(",", "")) > 0 for line in lines[2:])


@pytest.mark.parametrize("sparse", [False, True])
def test_the_plain_loop_has_the_loss_of_ours(tiny_samples, tmp_path, sparse):
    samples = read_samples(tiny_samples / "test_shard_0.hdf5")
    config = ModelConfig(samples.attributes["vocab_size"], 16, 2, 2, 32, "gelu", 0.0, 0.0, 10, encoder_ln_mode="post-ln")
    loop = imported("naive_training").PlainLoop(config, samples, torch.device("cpu"), sparse)
    loop.model.save_pretrained(tmp_path)
    rows = np.arange(40)
    batch = micro_batch(samples, rows, Packing())
    expected = masked_loss(load_model(tmp_path), batch) / len(batch.labels)
    torch.testing.assert_close(loop.loss(rows), expected)


def test_the_table_of_traces_comes_out(tiny_rules, tmp_path):
    sizes = ("--scale", 0.002, "--hidden-size", 16, "--layers", 1, "--cores", 1)
    done = benchmark("hessian", "--rule-path", tiny_rules, *sizes, "--output", tmp_path / "table.md")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| trace, ") for line in lines[2:]] == [
        "against GGN-Hutchinson (curvlinops)",
        "against the released double backward",
        "against Hutchinson on the Hessian (curvlinops)",
        "--plain-labels, against GGN-Hutchinson",
        "| a drawn label",
        "| peak memory of a batch",
    ]
    assert all(float(line[2].replace(",", "")) > 0 for line in lines[2:])


def test_other_estimators_agree_on_the_trace(tiny_rules):
    """Means over many probes of one batch: curvlinops' with ours, the double backward's with curvlinops'."""
    benchmark_hessian, naive = imported("benchmark_hessian"), imported("naive_hessian")
    bench = benchmark_hessian.Bench(tiny_rules, 0.001, 8, 1)
    chosen = bench.one_each(bench.contexts)
    ids, mask, flat = bench.contexts.batch(chosen, "cpu")
    rows, labels = torch.cat([ids, flat[:, None] % ids.shape[1]], 1), torch.from_numpy(bench.contexts.label[chosen])
    parameters = list(benchmark_hessian.measured_parameters(bench.model).values())
    torch.manual_seed(0)
    means = {}
    for name in ("gauss_newton", "hessian", "released"):
        estimate = getattr(naive, name)
        values = [estimate(naive.AtMasks(bench.model, 0), parameters, rows, labels) for _ in range(60)]
        means[name] = np.mean(values), np.std(values) / np.sqrt(60)
    ghost = benchmark_hessian.GhostNorms(bench.model, ids, mask, flat)
    every = [sum(ghost(torch.full((len(rows),), word)).values()) * ghost.f[:, word] for word in range(ghost.f.shape[1])]
    exact = sum(every).mean().item()
    value, error = means["gauss_newton"]
    assert abs(value - exact) < 4 * error < 0.2 * exact
    (value, error), (other, other_error) = means["released"], means["hessian"]
    assert abs(value - other) < 4 * np.hypot(error, other_error)


def test_the_spectrums_operator_is_curvlinops_hessian(tiny_rules, tiny_data):
    """The dense matrix of 316 parameters in float64; the exact loss as soft targets times the weights of the contexts."""
    naive = imported("naive_hessian")
    texts = sorted(read_texts(tiny_data / "test0.txt"), key=len)[:1]
    vocabulary = Vocabulary.read(tiny_data / "vocab.txt")
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    truth = Truth(table, np.array([vocabulary.ids[word] for word in table.words]))
    contexts = from_texts(texts, vocabulary, "test0.txt")
    torch.manual_seed(0)
    shape = {"max_position_embeddings": 10, "attention": "eager", "initializer_range": 0.5}
    model = MaskedLM(ModelConfig(vocabulary.size, 4, 1, 2, 8, **shape)).double().eval()
    every = np.arange(len(contexts.label))
    ids, _, flat = contexts.batch(every, "cpu")
    rows = torch.cat([ids, flat[:, None] % ids.shape[1]], 1)
    targets = truth.window(contexts, 0, 1, model)(every) / len(every)
    parameters = list(measured_parameters(model).values())
    expected = naive.dense_hessian(naive.AtMasks(model, vocabulary.pad_id), parameters, rows, targets).numpy()
    assert len(expected) < 400 and np.abs(expected).max() > 1
    found = hessian_operator(model, contexts, Sampling(), truth, 128) @ np.eye(len(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_numbers_and_goals(measure):
    assert [measure.number_text(value) for value in (1234567.0, 19.87, 0.01234, 2, 0.0)] == [
        "1,230,000",
        "19.9",
        "0.0123",
        "2",
        "0",
    ]
    assert measure.Row("a", 10, "u", 2, goal=10, goal_ratio=5).reached() is True
    assert measure.Row("a", 10, "u", 2, goal=10, goal_ratio=6).reached() is False
    assert measure.Row("a", 9, "u", 1, goal=10).reached() is False
    assert measure.Row("a", 9, "s", goal=10, smaller_is_better=True).reached() is True
    assert measure.Row("a", 10, "u", 2, goal_ratio=5).reached() is True
    assert measure.Row("a", 9, "u", 2, goal_ratio=5).cells() == ["a", "u", "9", "2", "4.5x", "5x", "no"]
    assert measure.Row("a", 9, "u", 1).cells() == ["a", "u", "9", "1", "9x", "", ""]


def test_the_memory_of_a_process_and_its_child_is_added_up(measure):
    # The child lives on at its peak, so that one of the looks, 20 ms apart, falls into it.
    child = "import time; x = bytearray(b'1') * (100 << 20); time.sleep(0.5)"
    program = f"import subprocess, sys; x = bytearray(b'1') * (200 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    assert 300 / 1024 < measure.peak_memory("-c", program) < 400 / 1024


@pytest.mark.parametrize("kind", ["ProductionSampler", "PreparedSampler"])
def test_sampled_text(naive, drawn, tmp_path, kind):
    grammar = drawn[0]
    random.seed(3)
    naive.write_text(getattr(naive, kind)(grammar.to_nltk()), tmp_path / "text.txt", 2000, 7)
    tokens, lengths = grammar.encode(read_texts(tmp_path / "text.txt"), "text")
    assert (tmp_path / "text.txt").read_text().count("\n") == 2 * len(lengths) - 1 == 3999
    assert np.isfinite(Chart(grammar).log_probability(tokens, lengths)).all()
    expected = Sampler(grammar, 7).length_probability
    expected = expected / expected.sum()
    error = np.sqrt(expected * (1 - expected) / len(lengths))
    assert (np.abs(np.bincount(lengths, minlength=8) / len(lengths) - expected) <= 4 * error).all()


@pytest.mark.parametrize("kind", ["DictionaryChart", "PairChart"])
def test_charts(naive, drawn, kind):
    grammar, arrays, sentences = drawn
    chart = getattr(naive, kind)(grammar.to_nltk())
    expected = Chart(grammar).log_probability(*arrays)
    np.testing.assert_allclose(np.log([chart.probability(words) for words in sentences]), expected, rtol=1e-9)

    for task in "ABC":
        labeller = Labeller(grammar, task)
        symbols = [Nonterminal(name) for name in labeller.names]
        found = [chart.label(words[: labeller.span], symbols) for words in sentences]
        assert len(set(found)) > 1 and found == labeller.label(*arrays).tolist()
    unlabelled = chart.label([chart.words[0]] * 9, [Nonterminal(grammar.names[0])])
    assert unlabelled == -1

    conditionals, offsets = Chart(grammar).conditionals(*arrays)
    entropy, log_true, _ = Chart(grammar).reductions(*arrays)
    assert chart.words == grammar.words
    for row in range(5):
        for position in range(len(sentences[row])):
            at, values = offsets[row] + position, np.array(chart.conditional(sentences[row], position))
            np.testing.assert_allclose(conditionals[at], values, rtol=0, atol=1e-5)
            positive = values[values > 0]
            assert entropy[at] == pytest.approx(-np.sum(positive * np.log(positive)), abs=1e-5)
            assert log_true[at] == pytest.approx(np.log(values[arrays[0][row, position]]), abs=1e-5)


def test_parses(naive, drawn):
    grammar, (tokens, lengths), sentences = drawn
    parser = ViterbiParser(grammar.to_nltk())
    for words, tree in zip(sentences[:10], Chart(grammar).parses(tokens[:10], lengths[:10]), strict=True):
        expected = naive.best_parse(parser, words)
        assert tree.leaves() == words
        assert probability(tree, grammar) == pytest.approx(expected.prob(), rel=1e-6)


def probability(tree, grammar) -> float:
    """Of a derivation: the product of its rules' probabilities."""
    rules = {(rule.lhs(), rule.rhs()): rule.prob() for rule in grammar.to_nltk().productions()}
    return float(np.prod([rules[rule.lhs(), rule.rhs()] for rule in tree.productions()]))


def test_masked_samples_are_of_the_same_sentences_and_have_as_many_masks(naive, tiny_data, tiny_samples, tmp_path):
    tokenizer = build_tokenizer(Vocabulary.read(tiny_data / "vocab.txt"), True, 10)
    random.seed(0)
    naive.write_masked_samples(tiny_data / "training0.txt", tokenizer, tmp_path / "naive.hdf5", 10, 3, 0.15, sentences=100)
    ours = read_samples(tiny_samples / "train_shard_0.hdf5")
    with h5py.File(tmp_path / "naive.hdf5") as file:
        theirs = {name: file[name][()] for name in DTYPES}
    assert {name: (array.shape[1], array.dtype) for name, array in theirs.items()} == {
        name: (getattr(ours, name).shape[1], getattr(ours, name).dtype) for name in DTYPES
    }
    for name in ("input_mask", "segment_ids"):
        np.testing.assert_array_equal(theirs[name], getattr(ours, name)[:100])
    np.testing.assert_array_equal(
        restored(theirs["input_ids"], theirs["masked_lm_positions"], theirs["masked_lm_ids"]),
        restored(ours.input_ids, ours.masked_lm_positions, ours.masked_lm_ids)[:100],
    )
    masks = [
        np.count_nonzero(positions, axis=1) for positions in (theirs["masked_lm_positions"], ours.masked_lm_positions[:100])
    ]
    np.testing.assert_array_equal(*masks)
    changed = theirs["input_ids"] != restored(theirs["input_ids"], theirs["masked_lm_positions"], theirs["masked_lm_ids"])
    assert 0.7 < changed.sum() / masks[0].sum() < 1


def restored(input_ids, positions, labels):
    """The tokens before they were masked."""
    tokens = input_ids.copy()
    rows = np.arange(len(tokens))
    for column in range(positions.shape[1]):
        masked = positions[:, column] > 0
        tokens[rows[masked], positions[masked, column]] = labels[masked, column]
    return tokens
