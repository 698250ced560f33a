import copy
import decimal
import threading
import time

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pcfg.common.means import SentenceMeans
from pcfg.common.text import read_texts
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable, main
from pretraining.data.contexts import Contexts, from_samples, from_texts
from pretraining.data.samples import sample_paths
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.inputs import Truth
from pretraining.evaluation.loss import compare_losses, context_losses, divergences, measure_loss
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, load_vocabulary
from pretraining.model.config import ModelConfig


@pytest.fixture(scope="module")
def measured(tiny_rules, tiny_data, tiny_model):
    """Model, vocabulary, 40 sentences, their contexts, table and columns."""
    texts = read_texts(tiny_data / "test0.txt")[:40]
    vocabulary = load_vocabulary(tiny_model)
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    return load_model(tiny_model), vocabulary, texts, from_texts(texts, vocabulary, "test0.txt"), table, columns


@torch.no_grad()
def naive_losses(model, vocabulary, texts, table):
    """Per sentence lists of (loss, entropy, sampled loss), one position and one word at a time, without padding."""
    sentences, row = [], 0
    for number, text in enumerate(texts):
        words, facts = text.split(), []
        ids = [vocabulary.cls_id, *(vocabulary.ids[word] for word in words), vocabulary.sep_id]
        conditionals = table.conditionals(number, number + 1)
        for t, word in enumerate(words):
            masked = [*ids[: t + 1], vocabulary.mask_id, *ids[t + 2 :]]
            log_f = model.predict(model.encode(torch.tensor([masked]))[0, t + 1]).double().log_softmax(-1)
            loss = entropy = 0.0
            for candidate, probability in zip(table.words, conditionals[t], strict=True):
                loss -= probability * log_f[vocabulary.ids[candidate]].item()
                entropy -= probability * np.log(probability) if probability > 0 else 0.0
            facts.append((loss, entropy, -log_f[vocabulary.ids[word]].item()))
            row += 1
        sentences.append(facts)
    return sentences


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_against_a_naive_loop(measured, batch_size):
    model, vocabulary, texts, contexts, table, columns = measured
    details = measure_loss(model, contexts, Truth(table, columns), batch_size)
    naive = naive_losses(model, vocabulary, texts, table)
    pairs = np.array([fact for facts in naive for fact in facts]).mean(0)
    sentences = np.array([np.mean(facts, 0) for facts in naive])
    for kind, mean in (("pairs", pairs), ("sentences", sentences.mean(0))):
        assert details["loss"][kind]["mean"] == pytest.approx(mean[0], abs=1e-5)
        assert details["entropy"][kind]["mean"] == pytest.approx(mean[1], abs=1e-6)
        assert details["sampled_loss"][kind]["mean"] == pytest.approx(mean[2], abs=1e-5)
        assert details["gap"][kind]["mean"] == pytest.approx(mean[0] - mean[1], abs=1e-5)
    error = (sentences[:, 0] - sentences[:, 1]).std(ddof=1) / np.sqrt(len(texts))
    assert details["gap"]["sentences"]["standard_error"] == pytest.approx(error, rel=1e-3)
    assert details["contexts"] == sum(map(len, naive)) and details["sentences"] == 40


def independent_words(tmp_path, probabilities, stored):
    """A model that answers with the same distribution everywhere, and texts of two independent words of `probabilities`.

    Args:
        stored: log probabilities the model is given, {word: log f}; of any other entry of the vocabulary it is -30.

    Returns:
        model, contexts, table, columns.
    """
    rules = "S A A 1.0\n" + "".join(f"A {word} {probability!r}\n" for word, probability in probabilities.items())
    (tmp_path / "rules.txt").write_text(rules)
    texts = [f"{a} {b}" for a in probabilities for b in probabilities]
    table = LookupTable.compute(Grammar.read(tmp_path / "rules.txt"), texts, "texts")
    vocabulary = Vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *probabilities, "zebra"])
    model = MaskedLM(ModelConfig(vocabulary.size, 8, 1, 1, 8, max_position_embeddings=4)).eval()
    with torch.no_grad():
        model.head_norm.weight.zero_()
        model.head_norm.bias.zero_()
        model.decoder_bias.fill_(-30.0)
        for word, log_f in stored.items():
            model.decoder_bias[vocabulary.ids[word]] = log_f
    columns = np.array([vocabulary.ids[word] for word in table.words])
    return model, from_texts(texts, vocabulary, "texts"), table, columns


P = {"cat": 0.5, "dog": 0.25, "fish": 0.25}


def test_the_true_distribution_has_no_gap(tmp_path):
    model, contexts, *given = independent_words(tmp_path, P, {word: np.log(p) for word, p in P.items()})
    details = measure_loss(model, contexts, Truth(*given))
    assert details["gap"]["pairs"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert details["gap"]["pairs"]["standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert details["loss"]["pairs"]["mean"] == pytest.approx(-sum(p * np.log(p) for p in P.values()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 1.0])
def test_small_gaps_are_resolved(tmp_path, scale):
    """KL is of the second order in log f: a difference of two losses would lose it in their rounding."""
    shift = {"cat": scale, "dog": -scale, "fish": 0.0}
    logits = {word: np.log(p) + shift[word] for word, p in P.items()}
    model, contexts, table, columns = independent_words(tmp_path, P, logits)
    log_f = np.array([model.decoder_bias[column].item() for column in columns])  # float32, as they are
    rest = 6 * np.exp(-30.0)
    log_f = log_f - np.log(np.exp(log_f).sum() + rest)
    expected = sum(P[word] * (np.log(P[word]) - value) for word, value in zip(table.words, log_f, strict=True))
    _, gap = context_losses(model, contexts, Truth(table, columns))
    np.testing.assert_allclose(gap, expected, rtol=1e-6, atol=1e-15)
    assert gap.min() >= -1e-12


@pytest.mark.parametrize("seed", range(3))
def test_divergences_against_exact_sums(seed):
    """Against 40 digits, for distributions that are near, far, and zero on some words; never below 0 but by rounding."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(30, 0.3), 50)
    rows[:, :5] = 0.0
    rows /= rows.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        near = np.maximum(np.log(rows), -60.0) + 10.0 ** -rng.integers(1, 9, (50, 1)) * rng.normal(size=rows.shape)
    log_f = torch.log_softmax(torch.from_numpy(near), 1)
    found = divergences(torch.from_numpy(rows), log_f).numpy()
    with decimal.localcontext(prec=40):
        for row, logs, value in zip(rows, log_f.numpy(), found, strict=True):
            terms = [(decimal.Decimal(p), decimal.Decimal(q)) for p, q in zip(row, logs, strict=True) if p > 0]
            assert value == pytest.approx(float(sum(p * (p.ln() - q) for p, q in terms)), abs=2e-14)
    assert found.min() >= -1e-12


def random_model(size, **changes):
    """A model whose predictions differ much from context to context."""
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(size, 16, 2, 2, 32, max_position_embeddings=10, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
def test_whole_vocabularies_and_batches(measured, monkeypatch, mode):
    """Words that never occur, in several blocks; several windows; any batch size: what one softmax in float64 gives."""
    _, vocabulary, _, contexts, table, columns = measured
    model = random_model(vocabulary.size + 300, encoder_ln_mode=mode)
    log_f = []
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for number in range(len(contexts.label)):
            log_f.append(exact(*contexts.batch(np.array([number]), "cpu")).log_softmax(-1)[0])
    log_f = torch.stack(log_f)
    rows = torch.from_numpy(table.conditionals(0, 40))
    expected = divergences(rows, log_f[:, columns]).numpy()
    monkeypatch.setattr("pretraining.evaluation.loss.BLOCK_WORDS", 64)
    found = []
    for numbers, batch_size in ((1 << 23, 256), (900, 1), (900, 5), (1 << 23, 64)):
        monkeypatch.setattr("pretraining.evaluation.loss.WINDOW_NUMBERS", numbers)
        sampled, gap = context_losses(model, contexts, Truth(table, columns), batch_size)
        np.testing.assert_allclose(gap, expected, rtol=2e-5)
        np.testing.assert_allclose(sampled, -log_f[np.arange(len(sampled)), contexts.label], rtol=2e-5, atol=2e-6)
        assert gap.mean() == pytest.approx(expected.mean(), rel=1e-6) and gap.min() >= -1e-12
        found.append(gap.mean())
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_threads_change_nothing(measured, monkeypatch):
    model, _, _, contexts, table, columns = measured
    alone = context_losses(model, contexts, Truth(table, columns), 16)
    before, encode, threads = torch.get_num_threads(), MaskedLM.encode, set()

    def slow_encode(*inputs):
        time.sleep(0.002)  # others begin meanwhile
        threads.add(threading.get_ident())
        return encode(*inputs)

    monkeypatch.setattr(MaskedLM, "encode", slow_encode)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = context_losses(model, contexts, Truth(table, columns), 16)
    assert torch.get_num_threads() == before and len(threads) == 3
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_samples_with_many_masks(measured, tiny_samples):
    """The plain MLM loss: masks as they are in the file, all of a sample's read from one forward pass."""
    model, vocabulary, *_ = measured
    contexts = from_samples(sample_paths(tiny_samples, "test")[0], vocabulary)
    assert contexts.counts.max() > 1
    sampled, gap = context_losses(model, contexts, batch_size=50)
    assert gap is None
    with torch.no_grad():
        for number in range(0, len(sampled), 7):
            logits = model(*contexts.batch(np.array([number]), "cpu"))[0].double()
            assert sampled[number] == pytest.approx(-logits.log_softmax(-1)[contexts.label[number]].item(), abs=1e-5)


def test_paired_comparison(measured):
    """Of two near models: the mean of the differences, with an error far below that of each gap."""
    _, vocabulary, _, contexts, table, columns = measured
    a, b = random_model(vocabulary.size), random_model(vocabulary.size)
    with torch.no_grad():
        b.layers[1].output.weight += 0.002 * torch.randn_like(b.layers[1].output.weight)
    losses = [context_losses(model, contexts, Truth(table, columns)) for model in (a, b)]
    details = compare_losses(*losses, contexts)
    gaps = [gap for _, gap in losses]
    sentences = [np.array([part.mean() for part in np.split(gap, contexts.offsets[1:-1])]) for gap in gaps]
    difference = sentences[0] - sentences[1]
    found = details["difference"]["sentences"]
    assert found["mean"] == pytest.approx(difference.mean(), rel=1e-9)
    assert found["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(40), rel=1e-9)
    assert 0 < found["standard_error"] < 0.1 * details["gap_a"]["sentences"]["standard_error"]
    assert details["gap_a"]["pairs"]["mean"] - details["gap_b"]["pairs"]["mean"] == pytest.approx(
        details["difference"]["pairs"]["mean"], abs=1e-12
    )
    swapped = compare_losses(losses[1], losses[0], contexts)["difference"]["pairs"]
    assert swapped["mean"] == pytest.approx(-details["difference"]["pairs"]["mean"], rel=1e-6)
    assert compare_losses(losses[0], losses[0], contexts)["difference"]["pairs"] == {"mean": 0.0, "standard_error": 0.0}
    assert {"difference", "loss_a", "loss_b"} < compare_losses(*[(sampled, None) for sampled, _ in losses], contexts).keys()


def test_sampled_and_exact_loss_agree_on_the_languages_own_text(measured, tiny_rules, tiny_data):
    model, vocabulary, *_ = measured
    texts = [text for name in ("training0.txt", "training1.txt") for text in read_texts(tiny_data / name)]
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "training")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    details = measure_loss(model, from_texts(texts, vocabulary, "training"), Truth(table, columns))
    difference = details["sampled_minus_exact"]["pairs"]
    assert 0 < difference["standard_error"] < 0.2
    assert abs(difference["mean"]) < 4 * difference["standard_error"]


def test_sentences_too_long_for_the_model(measured):
    model, vocabulary, *_ = measured
    contexts = from_texts(["cat dog cat dog cat dog cat dog cat"], vocabulary, "long.txt")
    with pytest.raises(InputError, match="long.txt: sentence [0-9]+ has 9 words.*max_position_embeddings 11 or more, not 10"):
        measure_loss(model, contexts, source="long.txt")


def test_a_table_of_entropies_only_gives_the_same_loss_up_to_its_error(measured, tiny_rules, tiny_data, tmp_path):
    model, _, _, contexts, table, columns = measured
    main(["--rule-path", str(tiny_rules), "--datafile", str(tiny_data / "test0.txt"), "--save-path", str(tmp_path / "t.hdf5")])
    reduced = tmp_path / "reduced.hdf5"
    main(
        [
            "--rule-path",
            str(tiny_rules),
            "--datafile",
            str(tiny_data / "test0.txt"),
            "--save-path",
            str(reduced),
            "--entropy-only",
        ]
    )
    full = measure_loss(model, contexts, Truth(table, columns))
    details = measure_loss(model, contexts, Truth(LookupTable.open(reduced), columns))
    assert "sampled_minus_exact" not in details
    assert details["sampled_loss"] == full["sampled_loss"]
    assert details["entropy"]["pairs"]["mean"] == pytest.approx(full["entropy"]["pairs"]["mean"], rel=1e-6)
    for kind in ("pairs", "sentences"):
        difference = full["sampled_minus_exact"][kind]
        gap = full["gap"][kind]["mean"] + difference["mean"]
        means = SentenceMeans().add(-table.log_true - table.entropy, contexts.counts)
        offset = (means.by_pairs() if kind == "pairs" else means.by_sentences())[0]
        assert details["gap"][kind]["mean"] == pytest.approx(gap - offset, abs=1e-5)


def test_batches_of_long_contexts_are_small():
    """Attention's memory grows by the square of the length: 8 contexts of 512 tokens at a time, whatever is asked for."""
    lengths = np.array([512] * 20 + [6] * 300)
    every = np.arange(320)
    contexts = Contexts(np.zeros((320, 512), np.int64), lengths, every, np.ones(320, np.int64), every, None)
    batches = contexts.batches(every, 128)
    assert [len(batch) for batch in batches] == [128, 128, 44, 8, 8, 4]
    assert np.array_equal(np.sort(np.concatenate(batches)), every)
