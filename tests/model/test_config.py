import pytest

from pcfg.common.files import InputError
from pretraining.model.config import ModelConfig

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("norm", ["pytorch", "rms_norm"])
def test_round_trip(mode, norm):
    config = ModelConfig(**SIZES, encoder_ln_mode=mode, layer_norm_type=norm, hidden_act="swish", max_position_embeddings=7)
    assert ModelConfig.from_transformers(config.to_transformers(), "config.json") == config


def test_apex_norm_is_stored_as_pytorch():
    stored = ModelConfig(**SIZES, layer_norm_type="apex").to_transformers()
    assert ModelConfig.from_transformers(stored, "config.json").layer_norm_type == "pytorch"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"hidden_size": 9}, "--hidden_size: 9 is not a multiple"),
        ({"hidden_act": "sine"}, "'sine'"),
        ({"hidden_dropout_prob": 1.0}, "--hidden_dropout_prob: 1.0"),
        ({"num_hidden_layers": 0}, "--num_hidden_layers: 0"),
        ({"layer_norm_type": "batch"}, "'batch'"),
        ({"attention": "flash"}, "'flash'"),
    ],
)
def test_impossible_values(wrong, named):
    with pytest.raises(InputError, match=named):
        ModelConfig(**{**SIZES, **wrong})


def test_other_models_are_refused():
    with pytest.raises(InputError, match=r"config.json: model_type 'gpt2'"):
        ModelConfig.from_transformers({"model_type": "gpt2"}, "config.json")


def test_other_padding_ids_are_refused():
    stored = {**ModelConfig(**SIZES).to_transformers(), "pad_token_id": 1}
    with pytest.raises(InputError, match="pad_token_id is 1"):
        ModelConfig.from_transformers(stored, "config.json")


def test_missing_values_name_the_file():
    stored = ModelConfig(**SIZES).to_transformers()
    del stored["hidden_size"]
    with pytest.raises(InputError, match="config.json: .*hidden_size"):
        ModelConfig.from_transformers(stored, "config.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_type": ["bert"]},
        {"hidden_size": "8"},
        {"hidden_size": 8.0},
        {"max_position_embeddings": None},
        {"layer_norm_eps": "small"},
        {"hidden_dropout_prob": None},
    ],
)
def test_values_of_another_type_name_the_file(wrong):
    stored = {**ModelConfig(**SIZES).to_transformers(), **wrong}
    with pytest.raises(InputError, match=f"config.json: .*{next(iter(wrong))}"):
        ModelConfig.from_transformers(stored, "config.json")
