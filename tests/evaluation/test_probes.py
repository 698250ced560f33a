"""Features against a loop over single sentences without padding, and the probe on data whose accuracy is known."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pcfg.common.text import read_texts
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable
from pretraining.data.contexts import concatenate, from_texts
from pretraining.evaluation import features as features_module
from pretraining.evaluation.downstream import DownstreamTrainingArguments
from pretraining.evaluation.features import (
    BATCH_TOKENS,
    POOLS,
    conditional_features,
    feature_width,
    hidden_features,
    table_features,
    word_features,
)
from pretraining.evaluation.probes import curve_point, fit_draws, label_draws
from pretraining.evaluation.solvers import ROUGH, ProbeData, accuracy, fit_adamw, fit_lbfgs, fit_ridge, linear_head, standardise
from pretraining.model.checkpoints import load_model, load_vocabulary

LENGTH = 12  # longer than any sentence needs: the padding must be zeros


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def texts(tiny_data):
    return read_texts(tiny_data / "test0.txt")[:40]


@pytest.fixture(scope="module")
def contexts(tiny_model, texts):
    return from_texts(texts, load_vocabulary(tiny_model), "texts")


def arguments(tmp_path, **changes):
    flags = {
        "learning_rate": 0.05,
        "num_train_epochs": 20,
        "per_device_train_batch_size": 64,
        "lr_scheduler_type": "polynomial",
    }
    return DownstreamTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{**flags, **changes})


def sentence_ids(text, vocabulary):
    return [vocabulary.cls_id, *(vocabulary.ids[word] for word in text.split()), vocabulary.sep_id]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 30, None])
@pytest.mark.parametrize("pool", POOLS)
def test_hidden_features_agree_with_one_sentence_at_a_time(model, tiny_model, texts, contexts, pool, tokens, monkeypatch):
    if tokens is not None:
        monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens)
    features = hidden_features(model, contexts, LENGTH, pool)
    vocabulary, width = load_vocabulary(tiny_model), model.config.hidden_size
    assert features.shape == (len(texts), feature_width(pool, LENGTH, width))
    assert not features.is_inference()  # a solver can differentiate by what multiplies them
    for row, text in zip(features, texts, strict=True):
        hidden = model.encode(torch.tensor([sentence_ids(text, vocabulary)]))[0]  # (length, hidden)
        if pool == "concat":
            assert (row[hidden.numel() :] == 0).all()
        expected = {"concat": hidden.flatten(), "mean": hidden.sum(0) / len(hidden), "cls": hidden[0]}[pool]
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_features_of_a_layer_and_of_one_word(model, tiny_model, texts, contexts):
    """Against the outputs of the modules themselves, as hooks see them, one sentence at a time."""
    vocabulary, width = load_vocabulary(tiny_model), model.config.hidden_size
    last = len(model.layers)
    assert last >= 2
    for layer, module in enumerate([model.embeddings, *model.layers[:-1], model.final_norm]):
        seen = []
        handle = module.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][0]))
        for text in texts[:10]:
            model.encode(torch.tensor([sentence_ids(text, vocabulary)]))
        handle.remove()
        features = hidden_features(model, contexts, LENGTH, layer=layer)
        one_word = hidden_features(model, contexts, LENGTH, 2, layer=layer)
        assert one_word.shape == (len(texts), width) == (len(texts), feature_width(2, LENGTH, width))
        for row, word, hidden in zip(features, one_word, seen, strict=False):
            torch.testing.assert_close(row[: hidden.numel()], hidden.flatten(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(word, hidden[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(features, hidden_features(model, contexts, LENGTH))
    with pytest.raises(InputError, match=f"--layer {last + 1}: the model has {last} layers"):
        hidden_features(model, contexts, LENGTH, layer=last + 1)


def test_hidden_features_on_a_device_without_a_limit_of_its_own(model, contexts, monkeypatch):
    expected = hidden_features(model, contexts, LENGTH)
    monkeypatch.delitem(BATCH_TOKENS, "cpu")
    torch.testing.assert_close(hidden_features(model, contexts, LENGTH), expected)


def test_word_features():
    parts = [[["a", "b"], ["b", "b", "c"]], [["b", "c"], ["a", "b", "d"]]]
    train, validation = word_features(parts)  # columns: a at 0, b at 1, b at 0, c at 2
    assert train.tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]
    assert validation.tolist() == [[0, 0, 1, 0], [1, 1, 0, 0]]  # c at 1 and d at 2 are not in the training part
    train, validation = word_features(parts, "mean")
    np.testing.assert_allclose(train, [[1 / 2, 1 / 2, 0], [0, 2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(validation, [[0, 1 / 2, 1 / 2], [1 / 3, 1 / 3, 0]], rtol=1e-6)
    assert [part.tolist() for part in word_features(parts, 1)] == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]


def test_a_sentence_that_is_there_twice_is_encoded_once(model, tiny_model, texts, monkeypatch):
    contexts = from_texts([texts[0], *texts[:5], texts[0]], load_vocabulary(tiny_model), "texts")
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda ids: encoded.extend(map(tuple, ids.tolist())) or encode(ids))
    features = hidden_features(model, contexts, LENGTH)
    assert len(encoded) == len(set(encoded)) == len(set(texts[:5]))
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[6])


@torch.no_grad()
@pytest.mark.parametrize("pool", ["concat", "mean", 3])
def test_conditional_features_agree_with_one_position_at_a_time(model, tiny_model, texts, contexts, pool, monkeypatch):
    monkeypatch.setattr(features_module, "BATCH_CONTEXTS", 16)
    features = conditional_features(model, contexts, LENGTH - 2, pool)
    vocabulary, size = load_vocabulary(tiny_model), model.config.vocab_size
    for row, text in zip(features, texts, strict=True):
        ids = sentence_ids(text, vocabulary)
        expected = torch.zeros(LENGTH - 2, size)
        for position in range(1, len(ids) - 1):
            masked = [*ids[:position], vocabulary.mask_id, *ids[position + 1 :]]
            logits = model.predict(model.encode(torch.tensor([masked]))[0, position])
            expected[position - 1] = torch.softmax(logits, -1)
        if pool == "mean":
            expected = expected.sum(0, keepdim=True) / len(text.split())
        if pool == 3:
            expected = expected[2:3]
        torch.testing.assert_close(row.view(-1, size), expected, atol=1e-5, rtol=1e-5)


def test_table_features_are_the_true_conditionals(tiny_rules, texts):
    """P(w | x_-t) = P(x with w at t) / sum over w: by substitution of every word."""
    grammar = Grammar.read(tiny_rules)
    table = LookupTable.compute(grammar, texts, "texts")
    features = table_features(table, 8).view(len(texts), 8, -1)
    assert torch.equal(table_features(table, 8, 2), features[:, 1])
    counts = torch.tensor([[len(text.split())] for text in texts])
    torch.testing.assert_close(table_features(table, 8, "mean"), features.sum(1) / counts)
    torch.testing.assert_close(table_features(table, 8, sentences=7), features[:7].flatten(1))
    for row, text in zip(features[:10], texts[:10], strict=True):
        words = text.split()
        substituted = [[*words[:t], word, *words[t + 1 :]] for t in range(len(words)) for word in grammar.words]
        probabilities = sentence_probabilities(grammar, substituted).reshape(len(words), -1)
        expected = probabilities / probabilities.sum(1, keepdims=True)
        np.testing.assert_allclose(row[: len(words)].numpy(), expected, atol=1e-6)
        assert (row[len(words) :] == 0).all()


def sentence_probabilities(grammar, sentences):
    """Inside probability by recursion over spans; all chains of unary rules together are (I - U)^-1."""
    unary = np.zeros((len(grammar.names), len(grammar.names)))
    unary[tuple(grammar.unary.T)] = grammar.unary_probability

    def inside(words):
        chart = {}
        for width in range(1, len(words) + 1):
            for start in range(len(words) - width + 1):
                if width == 1:
                    cell = grammar.emission[:, grammar.words.index(words[start])].copy()
                else:
                    cell = np.zeros(len(grammar.names))
                    for (lhs, left, right), p in zip(grammar.binary, grammar.binary_probability, strict=True):
                        for split in range(1, width):
                            cell[lhs] += p * chart[start, split][left] * chart[start + split, width - split][right]
                chart[start, width] = np.linalg.solve(np.eye(len(cell)) - unary, cell)
        return chart[0, len(words)][0]

    return np.array([inside(words) for words in sentences])


def test_concatenate_puts_zeros_at_padding():
    vectors = torch.arange(12.0).view(2, 3, 2) + 1
    rows = concatenate(vectors, torch.tensor([[1, 1, 1], [1, 0, 0]]), 4)
    assert rows.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0]]


def test_too_large_features_are_refused(model, contexts):
    with pytest.raises(InputError, match="GiB"):
        hidden_features(model, contexts, 1 << 36)


def separable(n, seed):
    """Three well separated clusters in 6 dimensions."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 3, n))
    centres = torch.tensor(np.random.default_rng(99).normal(0, 4, (3, 6)), dtype=torch.float32)
    return centres[labels] + torch.tensor(rng.normal(0, 0.3, (n, 6)), dtype=torch.float32), labels


def fit(train, labels, validation, validation_labels, classes, settings, seed, **changes):
    """Last, best and training accuracy of a probe by AdamW."""
    data = ProbeData(train, labels, validation, validation_labels, classes, train.shape[1])
    head, best = fit_adamw(dataclasses.replace(data, **changes), settings, seed)
    return {
        "last": accuracy(head, validation, validation_labels),
        "best": best,
        "train": accuracy(head, train, labels),
        "weight": head.weight.tolist(),
    }


def test_probe_on_separable_and_on_random_labels(tmp_path):
    (train, labels), (validation, validation_labels) = separable(600, 0), separable(900, 1)
    fitted = fit(train, labels, validation, validation_labels, 3, arguments(tmp_path), 0)
    assert fitted["last"] > 0.99 and fitted["train"] > 0.99
    rng = np.random.default_rng(2)
    noise, noise_labels = (torch.from_numpy(rng.integers(0, 3, n)) for n in (600, 900))
    chance = fit(train, noise, validation, noise_labels, 3, arguments(tmp_path), 0)
    assert abs(chance["last"] - 1 / 3) < 4 * (2 / 9 / 900) ** 0.5


def test_probe_is_reproducible_and_depends_on_the_seed(tmp_path):
    (train, labels), (validation, validation_labels) = separable(200, 0), separable(500, 1)
    settings = arguments(tmp_path, num_train_epochs=1, max_steps=3, learning_rate=1e-3)
    heads = [fit(train, labels, validation, validation_labels, 3, settings, seed) for seed in (0, 0, 1)]
    assert heads[0] == heads[1] != heads[2]


def test_columns_of_zeros_may_be_left_out(tmp_path):
    """The padding that no sentence reaches: the head on the other columns is the same, weight decay and clipping included."""
    (train, labels), (validation, validation_labels) = separable(200, 0), separable(100, 1)
    settings = arguments(tmp_path, num_train_epochs=2, weight_decay=0.1, max_grad_norm=0.1)
    padded = [torch.nn.functional.pad(features, (0, 10)) for features in (train, validation)]
    whole = fit(padded[0], labels, padded[1], validation_labels, 3, settings, 0)
    cut = fit(train, labels, validation, validation_labels, 3, settings, 0, width=16)
    for row, expected in zip(cut["weight"], whole["weight"], strict=True):
        assert row == pytest.approx(expected[:6], abs=1e-6)
    assert cut["last"] == whole["last"]


def test_drawn_sentences_are_a_training_part_of_their_own(tmp_path):
    (train, labels), (validation, validation_labels) = separable(200, 0), separable(100, 1)
    drawn, settings = np.random.default_rng(0).integers(200, size=200), arguments(tmp_path, num_train_epochs=2)
    data = ProbeData(train, labels, validation, validation_labels, 3, 6)
    head, _ = fit_adamw(data, settings, 0, drawn)
    expected, _ = fit_adamw(dataclasses.replace(data, features=train[drawn], labels=labels[drawn]), settings, 0)
    assert torch.equal(head.weight, expected.weight) and torch.equal(head.bias, expected.bias)


def test_draws_are_functions_of_file_count_and_number():
    draws = label_draws("ab" * 32, 100, 30, 3)
    assert [draw.tolist() for draw in draws[:2]] == [draw.tolist() for draw in label_draws("ab" * 32, 100, 30, 2)]
    assert all(len(set(draw.tolist())) == 30 and 0 <= draw.min() and draw.max() < 100 for draw in draws)
    others = [*draws, *label_draws("ab" * 32, 100, 31, 1), *label_draws("ac" * 32, 100, 30, 1)]
    assert len({tuple(draw[:30].tolist()) for draw in others}) == 5


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_a_curves_point_is_the_mean_over_draws(solver):
    """Against the solver on files that hold one draw each; with a draw that lacks a class."""
    (train, labels), (validation, validation_labels) = separable(200, 0), separable(150, 1)
    generator = torch.Generator().manual_seed(0)
    train, validation = (part + 5 * torch.randn(part.shape, generator=generator) for part in (train, validation))
    data = ProbeData(train, labels, validation, validation_labels, 3, 6)
    rng = np.random.default_rng(0)
    two_classes = np.flatnonzero(labels.numpy() != 1)[:20]
    draws = [two_classes, *(rng.permutation(200)[:20] for _ in range(2))]
    matches, strengths = fit_draws(data, solver, draws)
    for draw, match in zip(draws, matches, strict=True):
        part = dataclasses.replace(data, features=train[draw], labels=labels[draw], validation_features=validation.clone())
        if solver == "ridge":
            head = fit_ridge(part.features, part.labels, 3).head
        else:
            standardise(part)
            head = fit_lbfgs(part.features, part.labels, 3, strengths[0], ROUGH).head
        predicted = head(part.validation_features).argmax(1)
        assert match.tolist() == (predicted == validation_labels).tolist()
    assert not (predicted == 1).all() and (head.weight != 0).any() and len(strengths) == (3 if solver == "ridge" else 1)
    assert torch.equal(data.validation_features, validation)
    point = curve_point(data, solver, draws)
    assert (point.labels, point.draws, point.missing_classes, point.strengths) == (20, 3, 1, strengths)
    assert point.accuracy.mean == pytest.approx(matches.mean())
    assert point.accuracy.standard_error == pytest.approx(np.std(matches.mean(1), ddof=1) / 3**0.5)
    resampled = [matches[:, rng.integers(150, size=150)].mean() for _ in range(2000)]
    assert point.sampling_standard_error == pytest.approx(np.std(resampled), rel=0.06)


def naive_probe(features_of, labels, validation_of, validation_labels, training, seed):
    """The probe with features computed anew in every step, and the schedule written out."""
    from pcfg.common.files import keyed_rng

    head = linear_head(validation_of(slice(0, 1)).shape[1], 3, seed)
    batch = training.per_device_train_batch_size
    an_epoch = -(-len(labels) // batch)
    total, warmup, step = int(training.num_train_epochs) * an_epoch, training.warmup_steps, 0
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": 0.01}, {"params": [head.bias], "weight_decay": 0.0}], lr=1.0, eps=1e-8
    )
    for epoch in range(int(training.num_train_epochs)):
        order = keyed_rng(seed, "probe-order", epoch).permutation(len(labels))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rate = step / warmup if step < warmup else 1 - (step - warmup) / (total - warmup) * (1 - 1e-7 / 0.01)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * rate
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(features_of(chosen)), labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            step += 1
    return head, (head(validation_of(slice(None))).argmax(-1) == validation_labels).float().mean().item()


def test_cached_features_equal_uncached(model, contexts, tmp_path):
    """The same head as when the frozen encoder runs in every step, with schedule and clipping written out."""
    labels = torch.from_numpy(contexts.input_ids[:, 1] % 3)

    def features_of(chosen):
        part = copy.copy(contexts)
        part.input_ids, part.lengths = contexts.input_ids[chosen], contexts.lengths[chosen]
        return hidden_features(model, part, LENGTH).clone()

    settings = arguments(
        tmp_path, learning_rate=0.01, weight_decay=0.01, num_train_epochs=6, per_device_train_batch_size=16, warmup_steps=3
    )
    cached = features_of(slice(None))
    fitted = fit(cached, labels, cached, labels, 3, settings, 0)
    head, naive_accuracy = naive_probe(features_of, labels, features_of, labels, settings, 0)
    assert fitted["last"] == fitted["train"] == naive_accuracy > 0.6
    torch.testing.assert_close(torch.tensor(fitted["weight"]), head.weight.detach(), atol=1e-4, rtol=0)


def test_best_accuracy_is_over_the_evaluations(tmp_path):
    """The best of 6 steps evaluated one by one is the best of the last accuracies of runs of 1 .. 6 steps."""
    (train, labels), (validation, validation_labels) = separable(300, 0), separable(300, 1)
    constant = {"learning_rate": 0.3, "lr_scheduler_type": "constant"}

    def fitted_with(**changes):
        settings = arguments(tmp_path, **constant, **changes)
        return fit(train, labels + torch.arange(300) % 2, validation, validation_labels, 4, settings, 0)

    last = [fitted_with(max_steps=steps)["last"] for steps in range(1, 7)]
    fitted = fitted_with(max_steps=6, eval_strategy="steps", eval_steps=1)
    assert (fitted["best"], fitted["last"]) == (max(last), last[-1])
    assert len(set(last)) > 1
    every_epoch = fitted_with(max_steps=6, eval_strategy="epoch")  # 5 steps an epoch
    assert every_epoch["best"] == max(last[4], last[5])
