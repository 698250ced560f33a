import dataclasses
import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pcfg.common.files import InputError
from pretraining.model import layers
from pretraining.model.bert import MaskedLM
from pretraining.model.config import LAYER_NORM_MODES, ModelConfig
from pretraining.model.layers import eager_attention, sdpa_attention

CONFIG = ModelConfig(30, 16, 2, 4, 32, max_position_embeddings=9)
HAS_APEX = importlib.util.find_spec("apex") is not None


def random_model(**changes) -> MaskedLM:
    torch.manual_seed(0)
    model = MaskedLM(dataclasses.replace(CONFIG, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def naive_attention(query, key, value, mask):
    """One query at a time, over the visible keys only."""
    batch, heads, length, head_dim = query.shape
    out = torch.zeros_like(query)
    for b in range(batch):
        visible = [j for j in range(length) if mask is None or mask[b, 0, 0, j]]
        for h in range(heads):
            for i in range(length):
                scores = torch.stack([query[b, h, i] @ key[b, h, j] / math.sqrt(head_dim) for j in visible])
                out[b, h, i] = sum(w * value[b, h, j] for w, j in zip(scores.softmax(0), visible, strict=True))
    return out


@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_a_loop(attend, masked):
    query, key, value = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None] if masked else None
    assert torch.allclose(attend(query, key, value, mask, 0.0), naive_attention(query, key, value, mask), atol=1e-12)


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("norm", ["pytorch", "rms_norm"])
def test_padding_changes_nothing(mode, norm):
    model = random_model(encoder_ln_mode=mode, layer_norm_type=norm)
    ids = torch.randint(1, 30, (3, 6))
    padded = torch.cat([ids, torch.zeros(3, 3, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 6).expand(3, 9)
    assert torch.allclose(model.encode(padded, mask)[:, :6], model.encode(ids), atol=1e-5)


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_many_masks_a_sentence_are_few_with_copies_of_keys(mode, attention, monkeypatch):
    """In any order, twice, and with a sentence that has none: outputs and gradients."""
    ids, mask = torch.randint(1, 30, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    ids[1, 5:] = mask[1, 5:] = 0
    chosen = torch.tensor([30, 2, 3, 4, 9, 10, 11, 12, 13, 27, 28, 0, 2, 35, 29])  # the third sentence has none
    outputs, gradients = [], []
    for most in (8, 0):
        monkeypatch.setattr(layers, "MOST_COPIES", most)
        model = random_model(encoder_ln_mode=mode, attention=attention).double()
        outputs.append(model.predict(model.encode(ids, mask, chosen)))
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert outputs[0].shape == (15, 1, 30)
    assert torch.allclose(*outputs, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_layer_at_the_masked_positions_is_the_whole_one_there(mode, attention, layers):
    model = random_model(encoder_ln_mode=mode, attention=attention, num_hidden_layers=layers).double()
    ids = torch.randint(1, 30, (3, 6))
    mask = torch.arange(6) < torch.tensor([[4], [6], [5]])
    flat = torch.tensor([1, 2, 7, 10, 11, 16])  # two, three and one mask
    everywhere = model.predict(model.encode(ids, mask)).reshape(18, 30)
    assert torch.allclose(model(ids, mask, flat), everywhere[flat], atol=1e-12)
    weights = torch.randn(6, 30, dtype=torch.float64)
    expected = torch.autograd.grad((everywhere[flat] * weights).sum(), list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad((model(ids, mask, flat) * weights).sum(), list(model.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    none_padded = model.predict(model.encode(ids)).reshape(18, 30)[flat]
    assert torch.allclose(model(ids, None, flat), none_padded, atol=1e-12)


def test_activation_checkpointing_changes_nothing():
    model = random_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    ids, flat = torch.randint(1, 30, (3, 6)), torch.tensor([1, 8, 14])
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        logits = model(ids, None, flat)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_compiled_layers_compute_the_same():
    model = random_model(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double().train()
    inputs = [(torch.randint(1, 30, (size, 6)), None, torch.tensor([1, 8])) for size in (2, 3)]
    expected = [model(*each) for each in inputs]
    names = list(model.state_dict())
    model.compile_layers(backend="aot_eager")  # traces and differentiates as the default does, without its minute in g++
    assert list(model.state_dict()) == names
    for each, wanted in zip(inputs, expected, strict=True):
        assert torch.allclose(model(*each), wanted, atol=1e-12)


def test_the_tied_table_gets_both_gradients_and_the_bias_is_trained():
    model = random_model()
    ids = torch.tensor([[1, 2, 3]])
    model(ids, None, torch.tensor([1])).log_softmax(-1)[0, 7].backward()
    gradient = model.embeddings.words.weight.grad
    assert gradient[7].abs().sum() > 0  # as an output
    assert gradient[1].abs().sum() > 0  # as an input
    assert model.decoder_bias.grad[7] > 0
    assert sum("words" in name for name, _ in model.named_parameters()) == 1


def test_the_head_is_always_gelu_in_pre_ln():
    hidden = torch.randn(4, 16)
    relu, gelu = (random_model(hidden_act=act) for act in ("relu", "gelu"))
    assert torch.equal(relu.predict(hidden), gelu.predict(hidden))
    relu, gelu = (random_model(hidden_act=act, encoder_ln_mode="post-ln") for act in ("relu", "gelu"))
    assert not torch.allclose(relu.predict(hidden), gelu.predict(hidden))


def test_dropout_acts_in_training_only():
    model = random_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    ids = torch.randint(1, 30, (2, 5))
    assert torch.equal(model.encode(ids), model.encode(ids))
    model.train()
    assert not torch.equal(model.encode(ids), model.encode(ids))


def test_number_of_parameters_by_hand():
    h, i, v = 16, 32, 30
    layer = 4 * (h * h + h) + (h * i + i) + (i * h + h) + 2 * 2 * h
    expected = (v + 9 + 2) * h + 2 * h + 2 * layer + 2 * h + (h * h + h) + 2 * h + v
    assert CONFIG.parameters == sum(parameter.numel() for parameter in MaskedLM(CONFIG).parameters()) == expected


@pytest.mark.parametrize("mode", LAYER_NORM_MODES)
@pytest.mark.parametrize("norm", ["pytorch", "rms_norm"])
def test_number_of_parameters_is_that_of_the_model(mode, norm):
    config = ModelConfig(31, 12, 3, 2, 20, type_vocab_size=1, encoder_ln_mode=mode, layer_norm_type=norm)
    assert config.parameters == sum(parameter.numel() for parameter in MaskedLM(config).parameters())


@pytest.mark.skipif(HAS_APEX, reason="apex is installed")
@pytest.mark.parametrize("flag", [{"layer_norm_type": "apex"}, {"attention": "apex"}])
def test_missing_apex_says_how_to_build_it(flag):
    with pytest.raises(InputError, match="--attention of commit 3c98f93d or before.* git checkout 3c98f93d .*-build-isolation"):
        MaskedLM(dataclasses.replace(CONFIG, **flag))


class CastingNorm(torch.nn.LayerNorm):
    """Like apex's FusedLayerNorm, which takes and returns the type of autocast."""

    def forward(self, hidden):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        return super().forward(hidden).to(dtype)


def test_the_residual_stream_is_float32_with_the_norm_of_apex(monkeypatch):
    plain = random_model(num_hidden_layers=3)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", SimpleNamespace(FusedLayerNorm=CastingNorm))
    fused = random_model(num_hidden_layers=3, layer_norm_type="apex")
    ids = torch.randint(1, 30, (3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.encode(ids).dtype == torch.float32
        assert torch.equal(fused.encode(ids), plain.encode(ids))


@pytest.mark.skipif(not HAS_APEX, reason="NVIDIA apex is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex needs CUDA")
@pytest.mark.parametrize("flag", [{"layer_norm_type": "apex"}, {"attention": "apex"}])
def test_apex_agrees_with_pytorch(flag):
    plain, fused = random_model().cuda(), random_model(**flag).cuda()
    fused.load_state_dict(plain.state_dict())
    ids = torch.randint(1, 30, (4, 9), device="cuda")
    mask = torch.arange(9, device="cuda").expand(4, 9) < torch.tensor([[9], [7], [5], [9]], device="cuda")
    difference = (plain.encode(ids, mask) - fused.encode(ids, mask))[mask].abs().max()
    assert difference < 1e-5
