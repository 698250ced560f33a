"""Balanced trace, relative flatness and constant directions: under the symmetries, under enlarging, and by dense matrices."""

import dataclasses

import numpy as np
import pytest
import torch

from pcfg.common.text import read_texts
from pretraining.data.contexts import from_texts
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.flatness import PARTS, TABLES, balance, balanced_trace, constant_share, flatness_fields
from pretraining.evaluation.hessian import Sampling, estimate_trace, measured_parameters
from pretraining.model.enlarge import TIED_SCALES, Growth, enlarge
from tests.evaluation.dense import VARIANTS, Flat

WORDS, POSITIONS, TOKEN_TYPES = TABLES


def fields_of(model, contexts, **sampling) -> dict:
    estimate = estimate_trace("fisher", model, contexts, Sampling(nsamples=len(contexts.lengths), **sampling))
    values = estimate.partitions.tensors(estimate.values)
    return flatness_fields(values, estimate.sizes, measured_parameters(model), int(contexts.lengths.max()), 0.0)


def parts_of(fields: dict) -> np.ndarray:
    """T, H, M, V."""
    return np.array([getattr(fields["balanced"], name) for name in PARTS])


def copied(model, epsilon=None):
    """The model in other memory; with another epsilon of all norms."""
    config = model.config if epsilon is None else dataclasses.replace(model.config, layer_norm_eps=epsilon)
    copy = type(model)(config).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_scaling_tables_against_the_head_norm(small_model, sentences, mode, norm):
    contexts, _ = sentences
    model = copied(small_model(mode, norm, layers=1), epsilon=0.0)
    own = fields_of(model, contexts, soft_labels=True)
    tables, head_norm, *rest = parts_of(own)
    traces = []
    for scale in (0.5, (head_norm / tables) ** 0.25, 3.0):
        scaled = copied(model)
        with torch.no_grad():
            for name, parameter in scaled.named_parameters():
                parameter *= 1 / scale if name in TABLES else scale if name.startswith("head_norm.") else 1
        fields = fields_of(scaled, contexts, soft_labels=True)
        np.testing.assert_allclose(parts_of(fields), [scale**2 * tables, head_norm / scale**2, *rest], rtol=1e-9)
        for name in ("balanced", "relative"):
            assert fields[name].value == pytest.approx(own[name].value, rel=1e-9)
            assert fields[name].standard_error == pytest.approx(own[name].standard_error, rel=1e-9)
        traces.append(parts_of(fields).sum())
    assert traces[1] == pytest.approx(own["balanced"].value, rel=1e-9) and min(traces) == traces[1]


def test_shifts_between_the_tables(small_model, sentences):
    """Also with rows that no sentence reads, whatever they hold."""
    contexts, _ = sentences
    model = small_model(layers=1)
    own = fields_of(model, contexts)
    shifted = copied(model)
    generator = torch.Generator().manual_seed(0)
    c, d = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        shifted.embeddings.words.weight += c
        shifted.embeddings.positions.weight += d
        shifted.embeddings.token_types.weight[0] -= c + d
        shifted.embeddings.token_types.weight[1] += 5
        shifted.embeddings.positions.weight[int(contexts.lengths.max()) :] += 5
    fields = fields_of(shifted, contexts)
    np.testing.assert_allclose(parts_of(fields), parts_of(own), rtol=1e-9)
    for name in ("balanced", "relative", "constant_share"):
        assert fields[name].value == pytest.approx(own[name].value, rel=1e-9)

    def unshifted(model, fields):
        """R without the convention."""
        parameters = measured_parameters(model)
        return sum(tensor.value * parameters[name].square().sum().item() for name, tensor in fields["tensors"].items())

    assert abs(unshifted(shifted, fields) / unshifted(model, own) - 1) > 0.1


def constant_basis(flat, model, positions) -> torch.Tensor:
    """(parameters, 3 hidden), orthonormal: every word, every position read, or token type 0, moves by a unit vector."""
    width = model.config.hidden_size
    blocks = []
    for name, shape in flat.shapes.items():
        block = torch.zeros(*shape, 3 * width, dtype=torch.float64)
        if name in TABLES:
            table = TABLES.index(name)
            rows = {WORDS: len(block), POSITIONS: positions, TOKEN_TYPES: 1}[name]
            block[:rows, :, table * width : (table + 1) * width] = torch.eye(width, dtype=torch.float64) / rows**0.5
        blocks.append(block.flatten(0, -2))
    return torch.cat(blocks)


@pytest.mark.parametrize("mode, norm", [VARIANTS[0], VARIANTS[3]])
def test_constant_directions_by_dense_matrices(small_model, sentences, mode, norm):
    contexts, _ = sentences
    model = small_model(mode, norm, hidden=4, layers=1)
    flat = Flat(model, contexts)
    longest = int(contexts.lengths.max())
    basis = constant_basis(flat, model, longest)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64))
    shares = []
    for matrix in (flat.fisher(flat.f()), flat.hessian(flat.f(), range(2))):
        token_types = flat.by_parameter(matrix.diagonal())[TOKEN_TYPES]
        whole = matrix.trace().item()
        shares.append(constant_share(np.array([[token_types, whole]] * 2), np.ones(2), 13, longest, 0.0).value)
        assert shares[-1] == pytest.approx((basis.T @ matrix @ basis).trace().item() / whole, rel=1e-9)
        # Three copies of one direction of the function: words + c with token types - c does not change it.
        opposite = basis[:, :4] * 13**0.5 - basis[:, 8:]
        assert (matrix @ opposite).abs().max() < 1e-12 * matrix.abs().max()
    assert fields_of(model, contexts, soft_labels=True)["constant_share"].value == pytest.approx(shares[0], rel=1e-9)


@pytest.fixture(scope="module")
def many(tiny_data):
    """60 sentences, every position."""
    return from_texts(read_texts(tiny_data / "test0.txt")[:60], Vocabulary.read(tiny_data / "vocab.txt"), "test0.txt")


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_errors_against_the_jackknife(small_model, many, mode, norm):
    model = small_model(mode, norm, layers=1)
    estimate = estimate_trace("fisher", model, many, Sampling(nsamples=60))
    values = estimate.partitions.tensors(estimate.values)
    parameters = measured_parameters(model)

    def numbers(rows):
        fields = flatness_fields(values[rows], np.ones(len(rows)), parameters, 10, 0.0)
        wider = balanced_trace(fields["balanced"], times=3)
        return [fields["balanced"], wider, fields["relative"], fields["constant_share"]]

    everything = numbers(np.arange(60))
    without = np.array([[part.value for part in numbers(np.delete(np.arange(60), row))] for row in range(60)])
    jackknife = np.sqrt(59 / 60 * np.square(without - without.mean(0)).sum(0))
    np.testing.assert_allclose([part.standard_error for part in everything], jackknife, rtol=0.05)
    tables, head_norm, matrices, vectors = parts_of({"balanced": everything[0]})
    assert everything[1].value == pytest.approx(2 * np.sqrt(tables * head_norm) + matrices + vectors / 3)


def test_errors_of_units_of_unequal_size():
    """The bootstrap over units: sizes and values are correlated, as are the parts."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 20, 200)
    common = rng.normal(0, 1, 200)
    values = np.stack([5 + common, 3 + 0.5 * common + 0.02 * sizes, 4 + rng.normal(0, 1, 200), 2 - 0.3 * common], 1)
    error = balance(values, sizes, 0.0).standard_error
    draws = []
    for _ in range(2000):
        rows = rng.integers(200, size=200)
        draws.append(balance(values[rows], sizes[rows], 0.0).value)
    assert error == pytest.approx(np.std(draws), rel=0.06)


def test_where_the_balanced_trace_is_not_defined():
    spread = np.array([[-1.0], [1.0]]) * np.array([1.0, 1.0, 1.0, 1.0])  # a standard error of 1
    for means, errors, named in (
        ((1.9, 5, 3, 3), 2.0, r"the trace of tables, 1.9 \+- 1, is not above 2 standard errors"),
        ((5, -3, 3, 3), 2.0, r"the trace of head_norm, -3 \+- 1, "),
        ((5, 0, 3, 3), 0.0, r"the trace of head_norm, 0 \+- 1, is not above 0"),
    ):
        parts = balance(np.array(means) + spread, np.ones(2), errors)
        assert (parts.value, parts.standard_error) == (None, None) and balanced_trace(parts, 4) is None
        with pytest.raises(AssertionError, match=named):
            raise AssertionError(parts.reason)
        assert parts_of({"balanced": parts}).tolist() == list(means)
    defined = balance(np.array([2.1, 2.1, -3, 3]) + spread, np.ones(2), 2.0)
    assert defined.value == pytest.approx(4.2) and defined.reason is None
    assert constant_share(np.array([[1.0, 1.9]]) + spread[:, :2], np.ones(2), 3, 3, 2.0) is None


def grown(model, times, scale, heads=None, layers=0):
    """The enlarged model, with spare units and positions."""
    config = model.config
    large = dataclasses.replace(
        config,
        hidden_size=times * config.hidden_size,
        num_attention_heads=(heads or times) * config.num_attention_heads,
        intermediate_size=times * config.intermediate_size + 3,
        num_hidden_layers=config.num_hidden_layers + layers,
        max_position_embeddings=config.max_position_embeddings + 2,
    )
    return enlarge(model, Growth(config, large, scale))


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_enlarged_models_by_both_rules(small_model, sentences, mode, norm):
    """R is the small model's; the balanced trace is that of the small one's parts with V / K."""
    contexts, _ = sentences
    small = small_model(mode, norm, layers=1)
    own = fields_of(small, contexts)
    for times in (2, 4):
        expected = balanced_trace(own["balanced"], times)
        assert abs(expected.value / own["balanced"].value - 1) > 0.01
        totals = []
        for scale in TIED_SCALES:
            fields = fields_of(grown(small, times, scale), contexts)
            assert fields["relative"].value == pytest.approx(own["relative"].value, rel=1e-4)
            assert fields["balanced"].value == pytest.approx(expected.value, rel=1e-4)
            assert fields["balanced"].standard_error == pytest.approx(expected.standard_error, rel=1e-4)
            totals.append(parts_of(fields).sum())
        assert totals[0] != pytest.approx(totals[1], rel=0.01)  # the plain trace depends on the rule


@pytest.mark.parametrize("scale", TIED_SCALES)
def test_what_larger_heads_and_added_layers_change(small_model, sentences, scale):
    """Larger heads: queries, hence both numbers. Added layers: the balanced trace by their output biases; R not at all."""
    contexts, _ = sentences
    small = small_model(layers=1)
    plain, fewer, deeper = (fields_of(grown(small, 4, scale, **more), contexts) for more in ({}, {"heads": 1}, {"layers": 1}))
    for name, tensor in plain["tensors"].items():
        value = fewer["tensors"][name].value
        assert value > 1.001 * tensor.value if ".qkv." in name else value == pytest.approx(tensor.value, rel=1e-6), name
    queries = sum(fewer["tensors"][name].value - tensor.value for name, tensor in plain["tensors"].items() if ".qkv." in name)
    assert fewer["balanced"].value == pytest.approx(plain["balanced"].value + queries, rel=1e-6)
    assert abs(fewer["relative"].value / plain["relative"].value - 1) > 0.01
    added = {name: tensor for name, tensor in deeper["tensors"].items() if name.startswith("layers.1.")}
    biases = added["layers.1.output.bias"].value + added["layers.1.attention.output.bias"].value
    assert biases > 0 and sum(tensor.value for tensor in added.values()) == pytest.approx(biases)
    assert deeper["balanced"].value == pytest.approx(plain["balanced"].value + biases, rel=1e-6)
    assert deeper["relative"].value == pytest.approx(plain["relative"].value, rel=1e-6)
