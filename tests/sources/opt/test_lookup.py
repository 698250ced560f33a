"""The lookup table of a language model's text: the file, parts of a text, resuming, refusals, and the exact gap from it."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import calculate_hessian
import calculate_loss
import generate_pretraining
from pcfg.common.files import InputError, read_json, write_json
from pcfg.common.means import SentenceMeans
from pcfg.common.text import read_texts
from pcfg.lookup import LookupTable
from pretraining.data.contexts import from_texts, table_columns
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.inputs import Truth
from pretraining.evaluation.loss import context_losses
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, save_model
from pretraining.model.config import ModelConfig
from pretraining.report.rows import collect
from pretraining.sources.opt import lookup
from pretraining.sources.opt.causal_lm import TOP_TOKENS, load_causal_lm, read_restriction
from tests.bert_tokenizer import build_tokenizer

SENTENCES, LIMIT = 24, 6


@pytest.fixture(scope="module")
def opt_folder(make_opt, opt_folder, tmp_path_factory):
    """An OPT whose distributions are flat enough for sentences to end."""
    folder = tmp_path_factory.mktemp("models") / "flat"
    shutil.copytree(opt_folder, folder)
    make_opt(folder, 640, scale=0.3)
    return folder


@pytest.fixture(scope="module")
def text(opt_folder, tmp_path_factory):
    """Test sentences of a tiny OPT that is restricted to 20 tokens."""
    folder = tmp_path_factory.mktemp("text") / "opt"
    sizes = f"--shard-num 0 --test-shard-num 2 --test-sentence-num {SENTENCES} --length-limit {LIMIT + 1} --top-tokens 20"
    flags = [*sizes.split(), *"--frequency-sentences 100 --seed 1 --device cpu --n_processes 1".split()]
    generate_pretraining.main(["--source", "opt", "--model-name", str(opt_folder), "--save-path", str(folder), *flags])
    return folder


def arguments(text, model, save, *flags, datafile="test0.txt"):
    names = ["--data-path", text, "--model-name", model, "--datafile", text / datafile, "--save-path", save, "--device", "cpu"]
    return [str(part) for part in [*names, *flags]]


@pytest.fixture(scope="module")
def table_path(text, opt_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "lookup.hdf5"
    lookup.main(arguments(text, opt_folder, path))
    return path


@pytest.fixture(scope="module")
def some_path(text, opt_folder, tmp_path_factory):
    """2 positions of each of the first 20 sentences."""
    path = tmp_path_factory.mktemp("table") / "some.hdf5"
    lookup.main(arguments(text, opt_folder, path, "--positions-per-sentence", 2, "--max-sentences", 20))
    return path


@pytest.fixture(scope="module")
def naive(text, opt_folder):
    """The conditional of a position, by a forward pass a candidate, without a cache."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    loop = importlib.import_module("naive_conditionals").SubstituteEachWord
    restriction = read_restriction(text)
    model, _, _ = load_causal_lm(str(opt_folder), "cpu", torch.float32)
    loop = loop(model, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens)
    column = {piece: index for index, piece in enumerate(restriction.pieces)}
    sentences = [[column[piece] for piece in line.split()] for line in read_texts(text / "test0.txt")]
    return lambda sentence, place: np.array(loop.conditional(sentences[sentence], place))


def test_the_table(text, table_path, naive):
    table, texts = LookupTable.open(table_path), read_texts(text / "test0.txt")
    assert table.words == Vocabulary.read(text / "vocab.txt").words[5:] and len(table.words) == 20
    assert table.lengths.tolist() == [len(line.split()) for line in texts] and table.chosen is None
    assert table.lengths.min() < LIMIT == table.lengths.max()
    assert [table.words[word] for word in table.true_words] == " ".join(texts).split()
    table.check_text(text / "test0.txt")
    rows = table.conditionals(0, len(texts))
    for row in range(0, table.positions, 7):
        sentence = int(np.searchsorted(table.offsets, row, side="right")) - 1
        expected = naive(sentence, row - table.offsets[sentence])
        np.testing.assert_allclose(rows[row], expected, atol=1e-5)
        assert table.entropy[row] == pytest.approx(-np.sum(expected * np.log(expected)), abs=1e-4)
        assert table.log_true[row] == pytest.approx(np.log(expected[table.true_words[row]]), abs=1e-4)
    assert [path.name for path in table_path.parent.iterdir()] == [table_path.name]


def test_ways_to_store_it(text, opt_folder, table_path, tmp_path):
    whole = LookupTable.open(table_path)
    for flags in (["--dtype", "float16"], ["--entropy-only"]):
        lookup.main(arguments(text, opt_folder, tmp_path / flags[-1], *flags))
        table = LookupTable.open(tmp_path / flags[-1])
        assert table.stored == {"float16": "float16", "--entropy-only": "none"}[flags[-1]]
        np.testing.assert_array_equal(table.entropy, whole.entropy)
        np.testing.assert_array_equal(table.log_true, whole.log_true)


def test_a_part_of_the_text_is_the_part_of_the_table(text, opt_folder, table_path, some_path, tmp_path, capsys):
    whole, some = LookupTable.open(table_path), LookupTable.open(some_path)
    assert some.chosen == {"positions_per_sentence": 2, "seed": 0} and some.sentences == 20
    assert some.counts.tolist() == np.minimum(whole.lengths[:20], 2).tolist()
    np.testing.assert_array_equal(some.lengths, whole.lengths[:20])
    rows = whole.offsets[np.repeat(np.arange(20), some.counts)] + some.places
    assert len(set(rows.tolist())) == some.positions and (np.diff(rows) > 0).all()
    for name in ("entropy", "log_true", "true_words"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[rows], atol=1e-5)
    np.testing.assert_allclose(some.conditionals(3, 20), whole.conditionals(0, 24)[rows[some.offsets[3] :]], atol=1e-5)
    lookup.main(arguments(text, opt_folder, tmp_path / "seed.hdf5", "--positions-per-sentence", 2, "--seed", 1))
    assert LookupTable.open(tmp_path / "seed.hdf5").places[: some.positions].tolist() != some.places.tolist()
    lookup.main(arguments(text, opt_folder, some_path, "--positions-per-sentence", 2, "--max-sentences", 20))
    printed = capsys.readouterr().out
    assert "skipped, complete already" in printed and "20 sentences" in printed
    for flags in ([], ["--max-sentences", 20], ["--positions-per-sentence", 2, "--max-sentences", 20, "--seed", 5]):
        with pytest.raises(InputError, match="made with other sentences or positions.*--overwrite"):
            lookup.main(arguments(text, opt_folder, some_path, *flags))


def test_means_of_some_positions():
    """Values that are the same all over a sentence: then some positions say as much as all."""
    lengths, counts, value = np.array([3, 1, 4]), np.array([2, 1, 1]), np.array([1.0, 5.0, 2.0])
    some = SentenceMeans().add(np.repeat(value, counts), counts, lengths)
    whole = SentenceMeans().add(np.repeat(value, lengths), lengths)
    assert some.by_pairs() == pytest.approx(whole.by_pairs())
    assert some.by_sentences() == pytest.approx(whole.by_sentences())
    # chance: the mean over all choices is the mean of all
    values = np.array([1.0, 2.0, 6.0, 5.0, 2.0, 4.0])
    pairs = [np.array([a, 5.0, b]) for a in values[:3] for b in values[4:]]
    choices = [SentenceMeans().add(pair, [1, 1, 1], [3, 1, 2]).by_sentences()[0] for pair in pairs]
    assert np.mean(choices) == pytest.approx(SentenceMeans().add(values, [3, 1, 2]).by_sentences()[0])


@pytest.fixture(scope="module")
def masked_model(text, tmp_path_factory):
    """A folder with a random masked language model over the pieces."""
    folder = tmp_path_factory.mktemp("models") / "step0"
    vocabulary = Vocabulary.read(text / "vocab.txt")
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(vocabulary.size, 16, 2, 2, 32, max_position_embeddings=LIMIT + 2, initializer_range=0.3))
    save_model(folder, model, build_tokenizer(vocabulary, False, LIMIT + 2), vocabulary, {"step": 0, "job_name": "pieces"})
    return folder


def measure(text, masked_model, table, *flags):
    data = ["--datafile", text / "test0.txt", "--vocabfile", text / "vocab.txt", "--condprobfile", table, "--device", "cpu"]
    calculate_loss.main([str(part) for part in ["--model-path", masked_model, *data, *flags]])
    return read_json(masked_model / "loss.json")


def test_the_gap_is_that_of_a_naive_computation(text, masked_model, table_path, some_path, naive, tmp_path, capsys):
    folder = tmp_path / "models" / "step0"
    shutil.copytree(masked_model, folder)
    record = measure(text, folder, table_path)
    texts, vocabulary = read_texts(text / "test0.txt"), Vocabulary.read(text / "vocab.txt")
    model, gaps = load_model(folder), []
    for sentence, line in enumerate(texts):
        ids = [vocabulary.ids[word] for word in ("[CLS]", *line.split(), "[SEP]")]
        for place in range(len(ids) - 2):
            masked = torch.tensor([[*ids[: place + 1], vocabulary.mask_id, *ids[place + 2 :]]])
            with torch.no_grad():
                log_f = model(masked, None, torch.tensor([place + 1])).double().log_softmax(-1)[0, 5:].numpy()
            p = naive(sentence, place)
            gaps.append(np.sum(p * (np.log(p) - log_f)))
    gaps, lengths = np.array(gaps), np.array([len(line.split()) for line in texts])
    for mean, function in (("pairs", SentenceMeans.by_pairs), ("sentences", SentenceMeans.by_sentences)):
        expected = function(SentenceMeans().add(gaps, lengths))
        found = record["gap"][mean]
        assert (found["mean"], found["standard_error"]) == pytest.approx(expected, abs=2e-5)
    row = collect(tmp_path / "models").measured.xs("value", axis=1, level=1).iloc[0]  # of the report
    assert row["entropy_sentences"] == record["entropy"]["sentences"]["mean"] > 0.1 and row["gap_pairs"] > 0.1

    with pytest.raises(InputError, match="measured with other settings.*--overwrite"):
        measure(text, folder, some_path)
    capsys.readouterr()
    part = measure(text, folder, some_path, "--overwrite")
    assert "the first 20 of 24 sentences" in capsys.readouterr().out
    some = LookupTable.open(some_path)
    rows = np.concatenate([[0], np.cumsum(lengths)])[np.repeat(np.arange(20), some.counts)] + some.places
    for mean, function in (("pairs", SentenceMeans.by_pairs), ("sentences", SentenceMeans.by_sentences)):
        expected = function(SentenceMeans().add(gaps[rows], some.counts, some.lengths))
        found = part["gap"][mean]
        assert (found["mean"], found["standard_error"]) == pytest.approx(expected, abs=2e-5)
    assert part["sentences"] == 20 and part["contexts"] == some.positions


def test_who_needs_all_positions_says_so(text, masked_model, table_path, some_path):
    flags = ["--model-path", masked_model, "--datafile", text / "test0.txt", "--vocabfile", text / "vocab.txt"]
    with pytest.raises(InputError, match="some.hdf5: has only some positions.*without --positions-per-sentence 2"):
        calculate_hessian.main([str(part) for part in [*flags, "--condprobfile", some_path, "--device", "cpu"]])
    with pytest.raises(InputError, match="some positions"):
        LookupTable.open(some_path).check_whole(1)
    LookupTable.open(table_path).check_whole(24)
    with pytest.raises(InputError, match="first 24 sentences of its text only, but 25.*--max-sentences"):
        LookupTable.open(table_path).check_whole(25)


def test_a_table_of_other_sentences_is_refused(text, some_path):
    vocabulary = Vocabulary.read(text / "vocab.txt")
    texts = read_texts(text / "test1.txt")[:20]
    with pytest.raises(InputError, match="other sentences"):
        from_texts(texts, vocabulary, "test1.txt", LookupTable.open(some_path))


def test_entropies_alone_give_a_gap(text, opt_folder, masked_model, tmp_path):
    lookup.main(arguments(text, opt_folder, tmp_path / "e.hdf5", "--entropy-only", "--positions-per-sentence", 1))
    table = LookupTable.open(tmp_path / "e.hdf5")
    texts, vocabulary = read_texts(text / "test0.txt"), Vocabulary.read(text / "vocab.txt")
    contexts = from_texts(texts, vocabulary, "test0.txt", table)
    truth = Truth(table, table_columns(table, vocabulary, "e.hdf5"))
    sampled, gap = context_losses(load_model(masked_model), contexts, truth)
    np.testing.assert_allclose(gap, table.log_true + sampled)
    assert contexts.counts.tolist() == [1] * 24


def test_killed_and_run_again_gives_the_same_table(text, opt_folder, table_path, tmp_path, monkeypatch):
    """Batches of few tokens, written to the disk one by one; SIGKILL after some of them."""
    program = "from pretraining.sources.opt import lookup; import sys; lookup.SECONDS = 0.0; "
    program += "lookup.main(sys.argv[1:])"
    few = "--batch-tokens 40 --max-sentences 8".split()
    flags = arguments(text, opt_folder, tmp_path / "killed.hdf5", *few)
    progress = tmp_path / "killed.hdf5.partial" / "progress.json"
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([sys.executable, "-c", program, *flags], stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while not (progress.exists() and json.loads(progress.read_text())["done"] > 200):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.hdf5").exists()
    done = json.loads(progress.read_text())["done"]
    began = []
    compute = lookup.LogJoints.compute
    monkeypatch.setattr(lookup.LogJoints, "compute", lambda self, *rows: began.append(rows) or compute(self, *rows))
    lookup.main(flags)
    assert began[0][0] == done
    lookup.main(arguments(text, opt_folder, tmp_path / "whole.hdf5", *few))
    assert (tmp_path / "killed.hdf5").read_bytes() == (tmp_path / "whole.hdf5").read_bytes()
    found, expected = (LookupTable.open(path).entropy for path in (tmp_path / "whole.hdf5", table_path))
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.hdf5", "output", "whole.hdf5"]


def test_sentences_of_one_token_and_no_end(text, opt_folder, tmp_path):
    """Nothing is left to compute but the first token's own probabilities."""
    (tmp_path / "one").mkdir()
    tokens = read_json(text / TOP_TOKENS) | {"max_tokens": 1}
    write_json(tmp_path / "one" / TOP_TOKENS, tokens)
    (tmp_path / "one.txt").write_text(f"{tokens['pieces'][3]}\n\n{tokens['pieces'][1]}\n")
    lookup.main(arguments(tmp_path / "one", opt_folder, tmp_path / "one.hdf5", datafile=tmp_path / "one.txt"))
    rows = LookupTable.open(tmp_path / "one.hdf5").conditionals(0, 2)
    model, _, _ = load_causal_lm(str(opt_folder), "cpu", torch.float32)
    expected = model(torch.tensor([[tokens["start_id"]]])).logits[0, 0, tokens["kept"]].double().softmax(-1)
    np.testing.assert_allclose(rows, np.tile(expected.numpy(), (2, 1)), atol=1e-6)


def test_too_little_memory(text, opt_folder, tmp_path, monkeypatch):
    def compute(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lookup.LogJoints, "compute", compute)
    with pytest.raises(InputError, match="--batch-tokens 1024: not enough memory on cpu; give fewer"):
        lookup.main(arguments(text, opt_folder, tmp_path / "t.hdf5"))
    assert not (tmp_path / "t.hdf5").exists()


def test_what_does_not_belong_together(text, opt_folder, table_path, make_opt, tmp_path):
    def refused(message, *given, **named):
        with pytest.raises(InputError, match=message):
            lookup.main(arguments(*given, **named))

    shutil.copytree(opt_folder, tmp_path / "other")
    make_opt(tmp_path / "other", 640, seed=5)
    refused("is of another model", text, tmp_path / "other", tmp_path / "t.hdf5")
    refused("made from another text; .*--overwrite", text, opt_folder, table_path, datafile="test1.txt")
    refused("no such file", text, opt_folder, tmp_path / "t.hdf5", datafile="test7.txt")
    refused("top_tokens.json: no such file", tmp_path, opt_folder, tmp_path / "t.hdf5", datafile=text / "test0.txt")
    refused("is the text itself", text, opt_folder, text / "test0.txt")
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name, change in (("kept", 19), ("limit", 3)):
        tokens = read_json(text / TOP_TOKENS)
        if name == "kept":
            tokens |= {key: tokens[key][:change] for key in ("kept", "pieces", "counts")}
        else:
            tokens["max_tokens"] = change
        write_json(fewer / TOP_TOKENS, tokens)
        message = "is none of the kept tokens" if name == "kept" else "tokens, but the language has at most 3"
        (tmp_path / "all.txt").write_text(" ".join(read_restriction(text).pieces[-4:]) + "\n")
        refused(f"all.txt: sentence 1: .*{message}", fewer, opt_folder, tmp_path / "t.hdf5", datafile=tmp_path / "all.txt")
    assert not list(tmp_path.glob("t.hdf5*"))


def test_a_partial_array(tmp_path):
    folder, facts = tmp_path / "a.partial", {"of": "this"}
    with pytest.raises(KeyError), lookup.PartialArray(folder, facts, 5) as array:
        array.append(np.array([1.0, 2.0]))
        raise KeyError
    with open(folder / "values", "ab") as file:
        file.write(b"what a kill left")
    with lookup.PartialArray(folder, facts, 5) as array:
        assert array.done == 2
        array.append(np.array([3.0]))
        assert array.read().tolist() == [1.0, 2.0, 3.0]
    for other, length in (({"of": "that"}, 5), (facts, 6)):
        with pytest.raises(InputError, match="begun with another.*--overwrite"):
            lookup.PartialArray(folder, other, length)
    content = bytearray((folder / "values").read_bytes())
    content[3] ^= 1
    (folder / "values").write_bytes(content)
    with pytest.raises(InputError, match="values: damaged"):
        lookup.PartialArray(folder, facts, 5)
    assert lookup.PartialArray(folder, {"of": "that"}, 5, overwrite=True).done == 0
    folder.mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not made by this script"):
        lookup.PartialArray(folder, facts, 5)
