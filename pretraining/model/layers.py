"""LayerNorm and attention, each with its backends. The optional NVIDIA apex is imported here and nowhere else."""

import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcfg.common.files import InputError
from pretraining.model.config import ModelConfig

torch.backends.cuda.enable_cudnn_sdp(False)  # it takes half a second for each new shape, which nearly every batch is

ACTIVATION_FUNCTIONS: dict[str, Callable] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "swish": F.silu}

APEX_HELP = (
    "It needs NVIDIA's apex (that on PyPI is another project), for --attention of commit 3c98f93d or before. "
    "Build it where CUDA is: git clone https://github.com/NVIDIA/apex && cd apex && git checkout 3c98f93d && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def import_apex(module: str, flag: str) -> ModuleType:
    """A module of apex; the error without it says how to build it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{flag} apex: {module} can't be imported ({error}). {APEX_HELP}") from None


def layer_norm(config: ModelConfig) -> nn.Module:
    """A normalisation over the last dimension, of width `hidden_size`."""
    if config.layer_norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    if config.layer_norm_type == "apex":
        fused: Any = import_apex("apex.normalization", "--layer_norm_type").FusedLayerNorm

        class ApexLayerNorm(fused):
            def forward(self, hidden: Tensor) -> Tensor:
                # Under autocast it would return bfloat16, and make the residual stream that; PyTorch's returns float32.
                with torch.autocast(hidden.device.type, enabled=False):
                    return super().forward(hidden.to(self.weight.dtype))

        return ApexLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in plain operations, which can be differentiated twice and by `torch.func`.

    Query, key, value and result are (batch, heads, length, head_dim); the mask is (batch, 1, 1, length) bool, True for visible
    keys, or None. An attention weight is dropped with probability `dropout`.
    """
    with torch.autocast(query.device.type, enabled=False):  # scores and weights are float32 or wider
        wide = torch.promote_types(query.dtype, torch.float32)
        # (batch, heads, keys, queries): over short rows of keys the CPU's softmax takes 4 times as long.
        scores = key.to(wide) @ query.to(wide).transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(-1, -2), torch.finfo(wide).min)
        weights = F.dropout(scores.softmax(-2), dropout, training=dropout > 0)
        return (weights.transpose(-1, -2) @ value.to(wide)).to(query.dtype)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`eager_attention` by PyTorch's kernels for GPUs; on the CPU itself, which is as fast on short sentences or faster."""
    if query.device.type == "cpu":
        return eager_attention(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def apex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`eager_attention` with apex's fused scale-mask-softmax, which has its own fallback for shapes without a kernel."""
    functional = import_apex("apex.transformer.functional", "--attention")
    enums = import_apex("apex.transformer.enums", "--attention")
    softmax = functional.FusedScaleMaskSoftmax(
        input_in_fp16=query.dtype == torch.float16,
        input_in_bf16=query.dtype == torch.bfloat16,
        attn_mask_type=enums.AttnMaskType.padding,
        scaled_masked_softmax_fusion=True,
        mask_func=lambda scores, hidden: scores.masked_fill(hidden, torch.finfo(scores.dtype).min),
        softmax_in_fp32=True,
        scale=1.0 / math.sqrt(query.shape[-1]),
    )
    hidden = None if mask is None else ~mask.expand(-1, -1, query.shape[-2], -1)  # apex's masks are True where hidden
    weights = softmax(query @ key.transpose(-1, -2), hidden)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def attention_kernels(backend: str, device: torch.device, arithmetic: str) -> str:
    """The kernels by which `sdpa_attention` and the other backends compute attention on a device, for the record of a run."""
    on_cuda = "efficient" if arithmetic == "float32" else "flash without padding, efficient with it"
    return f"sdpa: {on_cuda if device.type == 'cuda' else 'eager'}" if backend == "sdpa" else backend


ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "eager": eager_attention, "apex": apex_attention}
Blocks = Sequence[tuple[int, int, bool]]  # number of sentences, length of each, and whether some are padded to it


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # rows of the query, then the key, then the value
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob
        if config.attention == "apex":
            import_apex("apex.transformer.functional", "--attention")  # fail when the model is built
        self.attend = ATTENTION_FUNCTIONS[config.attention]

    def forward(self, qkv: Tensor, blocks: Blocks, mask: Tensor | None) -> Tensor:
        """Contexts (N, hidden), before the output projection, of tokens with queries, keys and values (N, 3 hidden).

        Args:
            blocks: the sentences, block by block; rows after the last block are no token, and get zeros.
            mask: (N,) bool, True at tokens; None without padding.
        """
        sizes = [sentences * length for sentences, length, _ in blocks]
        rest = len(qkv) - sum(sizes)
        parts = qkv.split([*sizes, rest])
        masks = [None] * len(blocks) if mask is None else mask.split(sizes)
        contexts = []
        for (sentences, length, is_padded), part, visible in zip(blocks, parts, masks, strict=False):
            query, key, value = part.view(sentences, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            visible = visible.view(sentences, 1, 1, length) if is_padded and visible is not None else None
            context = self.attend(query, key, value, visible, self.dropout if self.training else 0.0)
            contexts.append(context.transpose(1, 2).reshape(sentences * length, -1))
        if rest:
            contexts.append(qkv.new_zeros(rest, qkv.shape[1] // 3))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)
