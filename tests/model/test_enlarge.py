"""The enlarged model against the small one, for every combination of shapes and rules, in float64."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import TABLES, TIED_SCALES, Growth, enlarge, largest_logit_difference, logit_differences

SMALL = ModelConfig(25, 8, 2, 2, 12, max_position_embeddings=7)


def random_small(**changes) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(dataclasses.replace(SMALL, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def large_shape(config: ModelConfig, times: int, heads: int | None = None, layers: int = 0, units: int = 0, positions: int = 0):
    """`config` with `times` the width and `heads` (default `times`) times the heads, and so many more of the rest."""
    return dataclasses.replace(
        config,
        hidden_size=times * config.hidden_size,
        num_attention_heads=(heads or times) * config.num_attention_heads,
        intermediate_size=times * config.intermediate_size + units,
        num_hidden_layers=config.num_hidden_layers + layers,
        max_position_embeddings=config.max_position_embeddings + positions,
    )


def random_contexts(count=6, length=6):
    """Inputs of one length and one masked position each, and a distribution over the words for each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(25, (count, length), generator=generator)
    flat = torch.arange(count) * length + torch.randint(length, (count,), generator=generator)
    truth = torch.rand(count, 25, generator=generator, dtype=torch.float64)
    return ids, flat, truth / truth.sum(1, keepdim=True)


HEADS = {1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 2, 4]}
COMBINATIONS = [
    (mode, norm, times) for mode in ("pre-ln", "post-ln") for norm in ("pytorch", "rms_norm") for times in sorted(HEADS)
]


@pytest.mark.parametrize("mode, norm, times", COMBINATIONS)
def test_loss_features_and_predictions_are_unchanged(mode, norm, times):
    """Heads, divided side, layers, units and positions in all combinations; epsilon 0 leaves nothing but rounding."""
    activation = {"pre-ln": "gelu", "post-ln": "tanh"}[mode]
    small = random_small(encoder_ln_mode=mode, layer_norm_type=norm, hidden_act=activation, layer_norm_eps=0.0).double()
    ids, flat, truth = random_contexts()
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    with torch.no_grad():
        log_f, hidden = small(ids, mask, flat).log_softmax(-1), small.encode(ids, mask)
        layers = (0, 2) if mode == "pre-ln" else (0,)
        for heads, scale, added, units, positions in itertools.product(HEADS[times], TIED_SCALES, layers, (0, 5), (0, 3)):
            growth = Growth(small.config, large_shape(small.config, times, heads, added, units, positions), scale)
            assert (growth.times, growth.copies) == (times, times // heads)
            large = enlarge(small, growth)
            found = large(ids, mask, flat).log_softmax(-1)
            torch.testing.assert_close(large.encode(ids, mask), hidden.repeat(1, 1, times), rtol=0, atol=1e-12)
            torch.testing.assert_close(found, log_f, rtol=0, atol=1e-12)
            torch.testing.assert_close((truth * found).sum(), (truth * log_f).sum(), rtol=1e-13, atol=0)
            assert found.argmax(-1).tolist() == log_f.argmax(-1).tolist()


def test_float32_rounding_and_epsilon_are_told_apart():
    """A large epsilon shifts the divided tables' model and not the other; divided as their variance is, it does not."""
    for epsilon in (1e-12, 1e-3):
        small = random_small(layer_norm_eps=epsilon)
        tables, head = (
            logit_differences(small, Growth(small.config, large_shape(small.config, 4), scale)) for scale in TIED_SCALES
        )
        for name in ("float64", "rounding"):
            assert head[name] < 1e-12
        assert head["epsilon"] == 0.0 and tables["rounding"] < 1e-12
        assert tables["float64"] == pytest.approx(tables["epsilon"], rel=0.01, abs=1e-12)
        assert 0 < head["float32"] < 1e-4
        if epsilon == 1e-3:
            assert tables["float64"] > 1e-3
            assert tables["float32"] == pytest.approx(tables["float64"], rel=0.01)
        else:
            assert tables["float64"] < 1e-8 and tables["float32"] < 1e-4


def exact_fisher(model: MaskedLM, first_added: int = 2) -> dict:
    """E_x sum_w f(w) ||d log f(w) / d parameter||^2 of each group of parameters, by one backward pass a context and a word."""
    ids, flat, _ = random_contexts()
    parameters = {name: parameter for name, parameter in model.named_parameters() if name != "decoder_bias"}
    log_f = model(ids, None, flat).log_softmax(-1)
    parts = dict.fromkeys(("tables", "encoder", "queries", "head", "vectors", "head_norm", "added"), 0.0)
    for row in log_f:
        for value in row:
            gradients = torch.autograd.grad(value, parameters.values(), retain_graph=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                squares = gradient.square().sum(tuple(range(1, gradient.dim()))) * value.detach().exp() / len(ids)
                group = "encoder" if name.startswith("layers.") else "head"
                if name in TABLES:
                    group = "tables"
                elif name.startswith("layers.") and int(name.split(".")[1]) >= first_added:
                    group = "added"
                elif parameter.dim() == 1:
                    group = "head_norm" if name.startswith("head_norm.") else "vectors"
                elif ".qkv." in name:
                    queries, *others = squares.chunk(3)
                    parts["queries"] += queries.sum().item()
                    squares = torch.cat(others)
                parts[group] += squares.sum().item()
    return parts


@pytest.fixture(scope="module")
def fisher_of():
    """exact_fisher of a small pre-LN model enlarged K times; each once."""
    torch.manual_seed(0)
    small, found = MaskedLM(dataclasses.replace(SMALL, initializer_range=0.5)).eval().double(), {}

    def of(times, heads=None, scale="tables", layers=0):
        key = (times, heads, scale, layers)
        if key not in found:
            growth = Growth(SMALL, large_shape(SMALL, times, heads, layers, units=4, positions=2), scale)
            found[key] = exact_fisher(enlarge(small, growth))
        return found[key]

    return of


@pytest.mark.parametrize("times", [2, 4])
def test_the_trace_depends_on_the_rule_but_the_matrices_part_does_not(fisher_of, times):
    """The laws of `pretraining.model.enlarge`; the comparison of a small and an enlarged model turns with the rule."""
    own = fisher_of(1)
    for scale, tables, head_norm in (("tables", times, 1 / times), ("head", 1 / times, times)):
        factors = {"tables": tables, "encoder": 1, "queries": 1, "head": 1, "vectors": 1 / times, "head_norm": head_norm}
        found = fisher_of(times, scale=scale)
        for name, factor in factors.items():
            assert found[name] == pytest.approx(factor * own[name], rel=1e-9)
        assert found["added"] == 0.0
    total = {scale: sum(fisher_of(times, scale=scale).values()) for scale in TIED_SCALES}
    assert total["head"] < min(sum(own.values()), total["tables"])
    if times == 4:  # larger than the small model's, or smaller: with twice the width the vectors' part still outweighs that
        assert total["tables"] > sum(own.values())


def test_the_heads_rule_and_added_layers_have_parts_of_their_own(fisher_of):
    own, same_number, deeper = fisher_of(1), fisher_of(4, heads=1), fisher_of(4, layers=1)
    assert same_number["queries"] == pytest.approx(4 * own["queries"], rel=1e-9)
    assert same_number["encoder"] == pytest.approx(own["encoder"], rel=1e-9)
    assert fisher_of(4, heads=2)["queries"] == pytest.approx(2 * own["queries"], rel=1e-9)
    assert deeper["added"] > 0
    for name in ("encoder", "queries", "tables"):
        assert deeper[name] == pytest.approx(fisher_of(4)[name], rel=1e-9)


def test_two_steps_are_as_good_as_one():
    """Enlarged twice by 2 with heads of the same size: the parameters of once by 4."""
    small = random_small()
    middle = large_shape(SMALL, 2, units=1)
    for scale in TIED_SCALES:
        steps = enlarge(enlarge(small, Growth(SMALL, middle, scale)), Growth(middle, large_shape(middle, 2), scale))
        once = enlarge(small, Growth(SMALL, steps.config, scale))
        assert {tuple(p.shape) for p in steps.parameters()} == {tuple(p.shape) for p in once.parameters()}
        assert largest_logit_difference(steps, once, 7) < 1e-4
        torch.testing.assert_close(steps.layers[1].attention.qkv.weight, once.layers[1].attention.qkv.weight)
        torch.testing.assert_close(steps.embeddings.words.weight, once.embeddings.words.weight)


def test_facts_say_what_was_done():
    facts = Growth(SMALL, large_shape(SMALL, 4, heads=2, layers=3, units=5, positions=6), "head").facts()
    assert facts == {"rule": "head", "times": 4, "heads": 2, "added_layers": [2, 3, 4], "added_units": 5, "added_positions": 6}


def test_the_difference_sees_a_wrong_model():
    small = random_small()
    large = enlarge(small, Growth(SMALL, large_shape(SMALL, 2)))
    with torch.no_grad():
        large.layers[1].output.bias[3] += 0.1
    assert largest_logit_difference(small, large, 7) > 1e-3
    with torch.no_grad():
        large.layers[1].output.bias[3] = float("nan")
    assert np.isnan(largest_logit_difference(small, large, 7))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": 20}, r"hidden_size is 20, needs a multiple of 8"),
        ({"num_attention_heads": 8}, r"num_attention_heads is 8, needs 2 x 2 = 4 \(heads of the same size\), 2 \(as many\)"),
        ({"num_attention_heads": 1}, r"num_attention_heads is 1"),
        ({"intermediate_size": 23}, r"intermediate_size is 23, needs 2 x 12 = 24 or more"),
        ({"vocab_size": 26}, r"vocab_size is 26, the small model has 25"),
        ({"max_position_embeddings": 6}, r"max_position_embeddings is 6, less than the small model's 7"),
        ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, less than the small"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'"),
        ({"layer_norm_type": "rms_norm"}, r"layer_norm_type is 'rms_norm'"),
        ({"encoder_ln_mode": "post-ln"}, r"encoder_ln_mode is 'post-ln'"),
    ],
)
def test_shapes_that_do_not_fit(changes, named):
    with pytest.raises(InputError, match=named):
        Growth(SMALL, dataclasses.replace(large_shape(SMALL, 2), **changes))


def test_post_ln_can_not_grow_deeper():
    post_ln = dataclasses.replace(SMALL, encoder_ln_mode="post-ln")
    with pytest.raises(InputError, match="pre-LN models only"):
        Growth(post_ln, large_shape(post_ln, 2, layers=1))
