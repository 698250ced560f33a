"""Sampling with a cache against a loop without one, its law against enumeration, and the choice of tokens."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pretraining.sources.opt import source
from pretraining.sources.opt.causal_lm import RestrictedLM
from pretraining.sources.opt.source import choose_tokens, count_tokens, sample


@pytest.fixture(scope="module")
def opt(make_opt, tmp_path_factory):
    return make_opt(tmp_path_factory.mktemp("opt") / "model", 40, seed=1).eval()


def naive_sample(model, kept, end, uniform):
    """One sentence, a forward pass of all of it for each token, cumulative sums over a list."""
    fed, columns = [end], []
    for number in uniform:
        logits = model(torch.tensor([fed])).logits[0, -1]
        candidates = kept if not columns else [*kept, end]
        cumulative = np.cumsum(torch.softmax(logits[candidates].float(), -1).double().numpy())
        column = next(i for i, total in enumerate(cumulative) if total > number * cumulative[-1])
        if column == len(kept):
            break
        columns.append(column)
        fed.append(kept[column])
    return columns


def test_sampling_is_that_of_a_loop_and_the_batch_does_not_matter(opt):
    kept, length = [30, 5, 8, 9, 11, 39, 3], 7
    restricted = RestrictedLM(opt, kept, 2, 2, length)
    uniform = np.random.default_rng(0).random((60, length))
    tokens = sample(restricted, uniform)
    assert tokens.shape == (60, length) and tokens.dtype == np.int64
    ended = 0
    with torch.inference_mode():
        for row, numbers in zip(tokens.tolist(), uniform, strict=True):
            expected = naive_sample(opt, kept, 2, numbers)
            assert row == expected + [restricted.end] * (length - len(expected)) and expected
            ended += len(expected) < length
    assert 2 < ended < 50, "both kinds of sentences are there"
    assert np.array_equal(np.concatenate([sample(restricted, uniform[i : i + 9]) for i in range(0, 60, 9)]), tokens)


def test_sampling_in_bfloat16(opt):
    uniform = np.random.default_rng(0).random((60, 7))
    exact, rounded = (
        sample(RestrictedLM(model, [30, 5, 8, 9], 2, 2, 7), uniform) for model in (opt, copy.deepcopy(opt).to(torch.bfloat16))
    )
    assert 0.7 < (exact == rounded).mean() <= 1


def test_the_law_of_sentences_is_the_joint_probability(opt, log_joint):
    """Chi-square against the enumeration of all 14 sentences of up to 3 of 2 tokens, at 0.1%."""
    from scipy.stats import chisquare

    restricted = RestrictedLM(opt, [7, 21], 2, 2, 3)
    number = 8_000
    tokens = sample(restricted, np.random.default_rng(3).random((number, 3)))
    counts = Counter(tuple(column for column in row if column != restricted.end) for row in tokens.tolist())
    sentences = [sentence for length in (1, 2, 3) for sentence in itertools.product(range(2), repeat=length)]
    expected = [number * log_joint(restricted, torch.tensor([sentence])).double().exp().item() for sentence in sentences]
    frequent = [i for i, value in enumerate(expected) if value > 5]
    seen = [counts[sentences[i]] for i in frequent]
    assert len(frequent) > 5 and sum(counts.values()) == number
    rest = [number - sum(seen)], [number - sum(expected[i] for i in frequent)]
    assert chisquare([*seen, *rest[0]], [*(expected[i] for i in frequent), *rest[1]]).pvalue > 1e-3


def test_frequencies_are_those_of_a_sample_of_all_tokens(opt, monkeypatch):
    counts = count_tokens(opt, 2, 2, 5, seed=0, sentences=1_200, batch_size=100, jobs=1)
    assert counts.shape == (40,) and counts[2] == 0 and counts.sum() > 1_200
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert np.array_equal(count_tokens(opt, 2, 2, 5, seed=0, sentences=1_200, batch_size=100, jobs=2), counts)
    assert not np.array_equal(count_tokens(opt, 2, 2, 5, seed=1, sentences=1_200, batch_size=100, jobs=1), counts)
    everything = RestrictedLM(opt, [i for i in range(40) if i != 2], 2, 2, 5)
    logits = everything.model(torch.tensor([[2]])).logits[:, -1]
    first = everything.log_probabilities(logits, first=True)[0, :-1].exp()
    monkeypatch.setattr(source, "SENTENCES_PER_COUNT", 4_000)
    one = count_tokens(opt, 2, 2, 1, seed=0, sentences=4_000, batch_size=4_000, jobs=1)
    assert one.sum() == 4_000
    assert np.abs(np.delete(one, 2) / 4_000 - first.detach().numpy()).max() < 4 * 0.5 / 4_000**0.5


def test_the_choice_of_tokens():
    tokens = {0: b"a", 1: b" a", 3: b"x\ny", 4: b"b", 5: b"a", 6: b"", 7: b"c", 8: "\u2028".encode(), 9: b"[MASK]", 10: b"z"}
    counts = np.array([1, 5, 9, 7, 3, 4, 8, 3, 6, 6, 0, 2])
    # 2 is the end token, 3, 6, 8 and 9 are no words, 0 has the bytes of 5, 11 is special; 4 and 7 tie
    assert choose_tokens(counts, tokens, 5, 2) == ([1, 5, 4, 7, 10], ["Ġa", "‿a", "‿b", "‿c", "‿z"])
    assert choose_tokens(counts, tokens, 2, 2)[0] == [1, 5]
    with pytest.raises(InputError, match=r"the model has 5 tokens that can be words \(of 12; .*give 5 or fewer"):
        choose_tokens(counts, tokens, 6, 2)


def test_a_model_without_a_cache(opt):
    restricted = RestrictedLM(opt, [7, 21], 2, 2, 3)

    class Output(dict):
        logits = torch.zeros(2, 1, 3)

    restricted.model = lambda **_: Output()
    with pytest.raises(InputError, match="keeps no keys and values"):
        sample(restricted, np.zeros((2, 3)))
