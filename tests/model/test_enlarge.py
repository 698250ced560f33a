import dataclasses

import pytest
import torch

from pcfg.artefacts import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import enlarge, largest_logit_difference

SMALL = ModelConfig(25, 8, 2, 2, 12, max_position_embeddings=7)


def random_small(**changes) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(dataclasses.replace(SMALL, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def large_shape(config: ModelConfig, times: int, added: int = 0) -> ModelConfig:
    return dataclasses.replace(
        config,
        hidden_size=times * config.hidden_size,
        num_attention_heads=times * config.num_attention_heads,
        intermediate_size=times * config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers + added,
    )


@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "added, variant",
    [
        (0, {"encoder_ln_mode": "pre-ln"}),
        (2, {"encoder_ln_mode": "pre-ln"}),
        (1, {"encoder_ln_mode": "pre-ln", "layer_norm_type": "rms_norm"}),
        (0, {"encoder_ln_mode": "post-ln", "hidden_act": "tanh"}),
    ],
)
def test_the_function_is_preserved(times, added, variant):
    small = random_small(**variant)
    large = enlarge(small, large_shape(small.config, times, added), times)
    assert largest_logit_difference(small, large) < 1e-4
    exact = enlarge(small.double(), large_shape(small.config, times, added), times)
    assert largest_logit_difference(small, exact) < 1e-9  # what is left is the embedding LayerNorm's epsilon
    ids = torch.randint(25, (3, 6))
    hidden = small.encode(ids).repeat(1, 1, times)
    assert torch.allclose(exact.encode(ids), hidden, atol=1e-9)


def test_the_difference_sees_a_wrong_model():
    small = random_small()
    large = enlarge(small, large_shape(small.config, 2), 2)
    with torch.no_grad():
        large.layers[1].output.bias[3] += 0.1
    assert largest_logit_difference(small, large) > 1e-3


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": 24}, r"hidden_size is 24, needs 2 x 8 = 16"),
        ({"num_attention_heads": 2}, r"num_attention_heads is 2, needs 2 x 2 = 4"),
        ({"intermediate_size": 12}, r"intermediate_size is 12"),
        ({"vocab_size": 26}, r"vocab_size is 26, the small model has 25"),
        ({"max_position_embeddings": 9}, r"max_position_embeddings is 9"),
        ({"num_hidden_layers": 1}, r"less than the small"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'"),
        ({"encoder_ln_mode": "post-ln"}, r"encoder_ln_mode is 'post-ln'"),
    ],
)
def test_shapes_that_do_not_fit(changes, named):
    with pytest.raises(InputError, match=named):
        enlarge(random_small(), dataclasses.replace(large_shape(SMALL, 2), **changes), 2)


def test_post_ln_can_not_grow_deeper():
    small = random_small(encoder_ln_mode="post-ln")
    with pytest.raises(InputError, match="pre-LN models only"):
        enlarge(small, large_shape(small.config, 2, added=1), 2)
