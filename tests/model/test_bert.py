import dataclasses
import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pcfg.common.files import InputError
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


class OnGpu(torch.Tensor):
    device = SimpleNamespace(type="cuda")


def sdpa_on_gpu(query, *inputs):
    """What `sdpa_attention` calls for a GPU."""
    return sdpa_attention(query.as_subclass(OnGpu), *inputs).as_subclass(torch.Tensor)


def test_attention_in_bfloat16_has_float32_scores():
    half = [tensor.bfloat16().requires_grad_() for tensor in 4 * torch.randn(3, 8, 4, 13, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        found = eager_attention(*half, None, 0.0)
    found.sum().backward()
    rounded = [tensor.detach().double().requires_grad_() for tensor in half]
    expected = eager_attention(*rounded, None, 0.0)
    expected.sum().backward()
    assert found.dtype == torch.bfloat16
    for one, other in ((found, expected), *((a.grad, b.grad) for a, b in zip(half, rounded, strict=True))):
        assert (one - other).norm() < 3e-3 * other.norm()


@pytest.mark.parametrize("attend", [eager_attention, sdpa_on_gpu])
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
def test_packed_sentences_are_those_of_a_padded_batch(mode, attention):
    """Outputs and gradients, with chosen positions in any order, twice, and a sentence that has none."""
    model = random_model(encoder_ln_mode=mode, attention=attention).double()
    lengths = [3, 3, 4, 6, 9]
    ids = torch.randint(1, 30, (5, 9))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    chosen = torch.tensor([37, 2, 0, 10, 28, 2, 44])  # of 9 tokens each; the third sentence has none
    expected = model(ids, mask, chosen)
    # Two blocks, the second of which is padded to 9 tokens, and two rows of no sentence.
    blocks = [(2, 3, False), (3, 9, True)]
    row, column = torch.tensor([(row, column) for row, width in enumerate([3, 3, 9, 9, 9]) for column in range(width)]).T
    packed = torch.cat([ids[row, column], torch.tensor([0, 0])])
    position_ids = torch.cat([column, torch.tensor([0, 0])])
    place = {(r, c): index for index, (r, c) in enumerate(zip(row.tolist(), column.tolist(), strict=True))}
    positions = torch.tensor([place[divmod(flat, 9)] for flat in chosen.tolist()])
    found = model(packed, mask[row, column], positions, position_ids, blocks)
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    pairs = [torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (found, expected)]
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*pairs, strict=True))
    everywhere = model(packed, mask[row, column], None, position_ids, blocks)
    is_token = mask[row, column]
    assert torch.allclose(everywhere[:-2][is_token], model.encode(ids, mask)[row, column][is_token], atol=1e-12)


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
