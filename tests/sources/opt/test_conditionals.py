"""Masked conditionals of restricted causal models against enumeration, and against a forward pass a candidate."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from pretraining.sources.opt.causal_lm import RestrictedLM
from pretraining.sources.opt.conditionals import LogJoints, MaskedTexts, conditionals, weight_number


def tiny_opt(seed=0, size=20, layers=2, width=16):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width, "max_position_embeddings": 64}
    return OPTForCausalLM(
        OPTConfig(vocab_size=size, num_hidden_layers=layers, num_attention_heads=2, init_std=0.5, **sizes)
    ).eval()


def tiny_gpt2():
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, bos_token_id=2, eos_token_id=3, **sizes)).eval()


def contexts_of(sentences, positions=None):
    """Of all positions of sentences, or of one of each."""
    lengths = np.array([len(sentence) for sentence in sentences])
    flat = np.array([column for sentence in sentences for column in sentence])
    places = [range(length) for length in lengths] if positions is None else [[place] for place in positions]
    sentence = np.repeat(np.arange(len(sentences)), [len(chosen) for chosen in places])
    return *MaskedTexts.of(flat, lengths, sentence, np.concatenate(places)), sentence, np.concatenate(places)


def all_rows(joints):
    """Batch by batch, as the command computes them: (contexts, V)."""
    batches = list(joints.compute_from(0))
    assert [first for first, _, _ in batches] == [0, *(last for _, last, _ in batches[:-1])] and batches[-1][1] == joints.rows
    rows = [values for _, _, values in batches]
    return np.concatenate(rows).reshape(-1, joints.words), len(rows)


@pytest.mark.parametrize("make", [tiny_opt, tiny_gpt2])
def test_conditionals_are_ratios_of_the_probabilities_of_all_sentences(make, log_joint):
    """8 kept tokens, at most 4 a sentence: every sentence, every position; those of 4 tokens have no factor of the end."""
    model, kept, limit = make(), [5, 19, 7, 3, 9, 10, 4, 12], 4
    restricted = RestrictedLM(model, kept, 2, 2, limit)
    joint = {}
    for length in range(1, limit + 1):
        sentences = list(itertools.product(range(8), repeat=length))
        joint |= dict(zip(sentences, log_joint(restricted, torch.tensor(sentences)).double().exp().tolist(), strict=True))
    assert sum(joint.values()) == pytest.approx(1, abs=1e-5)
    texts, which, sentence, position = contexts_of(list(joint))
    assert len(texts) == sum(length * 8 ** (length - 1) for length in range(1, 5))  # each computed once
    log_joint, _ = all_rows(LogJoints(restricted, texts))
    p, log_p = conditionals(log_joint)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-14)
    np.testing.assert_array_equal(np.exp(log_p), p)
    sentences = list(joint)
    expected = np.empty((len(sentence), 8))
    for row, (number, place) in enumerate(zip(sentence, position, strict=True)):
        words = sentences[number]
        expected[row] = [joint[(*words[:place], word, *words[place + 1 :])] for word in range(8)]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p[which], expected, atol=1e-5)
    assert p.max() > 0.5  # not all alike


@pytest.mark.parametrize("make", [lambda: tiny_opt(3, 300, 3, 32), tiny_gpt2], ids=["opt", "gpt2"])
def test_against_a_forward_pass_a_candidate(make, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    naive = importlib.import_module("naive_conditionals")
    model, rng = make(), np.random.default_rng(0)
    kept = [index for index in rng.permutation(model.config.vocab_size).tolist() if index != 2][:60]
    limit = 9
    restricted, loop = RestrictedLM(model, kept, 2, 2, limit), naive.SubstituteEachWord(model, kept, 2, 2, limit)
    sentences = [rng.integers(len(kept), size=length).tolist() for length in (1, 2, 5, 8, 9, 9)]
    texts, which, sentence, position = contexts_of(sentences, [0, 1, 2, 0, 8, 4])
    p, _ = conditionals(all_rows(LogJoints(restricted, texts))[0])
    for row, number, place in zip(which, sentence, position, strict=True):
        np.testing.assert_allclose(p[row], loop.conditional(sentences[number], place), rtol=1e-4, atol=1e-7)


def test_batches_of_any_size_give_the_same():
    restricted = RestrictedLM(tiny_opt(), [5, 6, 7, 8, 9, 10, 11], 2, 2, 6)
    rng = np.random.default_rng(1)
    texts, *_ = contexts_of([rng.integers(7, size=length).tolist() for length in rng.integers(1, 7, size=20)])
    numbers, values = [], []
    for tokens in (1, 10, 50, 4096):
        joints = LogJoints(restricted, texts, tokens)
        found, batches = all_rows(joints)
        numbers.append(batches)
        values.append(found)
        np.testing.assert_allclose(found, values[0], atol=1e-5)
    assert numbers[0] == joints.rows and sorted(numbers, reverse=True) == numbers and numbers[-1] == len(texts.groups()) - 1


def test_batches_side_by_side(monkeypatch):
    restricted = RestrictedLM(tiny_opt(), [5, 6, 7, 8, 9, 10, 11], 2, 2, 6)
    rng = np.random.default_rng(2)
    joints = LogJoints(restricted, contexts_of(rng.integers(7, size=(10, 6)).tolist())[0], 20)
    alone, number = all_rows(joints)
    assert number > 20
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    np.testing.assert_array_equal(all_rows(joints)[0], alone)
    assert torch.get_num_threads() == 1
    compute = joints.compute
    monkeypatch.setattr(joints, "compute", lambda first, last: compute(first, last if first < 100 else joints.rows))
    with pytest.raises((RuntimeError, ValueError, IndexError)):  # an error in a thread is one of the caller's
        all_rows(joints)


def test_operations_add_up():
    model = tiny_opt()
    restricted = RestrictedLM(model, [5, 6, 7], 2, 2, 4)
    texts, *_ = contexts_of([[0, 1, 2, 0], [2, 1]])
    joints = LogJoints(restricted, texts)
    # the first position of 4 takes w and two more tokens, the last none; the second sentence ends, which takes its last token
    assert joints.input_tokens.tolist() == [2, 1, 3, 2, 1, 0]
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 16  # two layers, and the head of the kept and the end token
    assert weight_number(restricted.model) == weights
    assert joints.operations(0, 18) == 2 * weights * 3 * 9
    for cut in range(1, 18):
        assert joints.operations(0, cut) + joints.operations(cut, 18) == joints.operations(0, 18)
