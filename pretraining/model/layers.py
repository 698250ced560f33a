"""LayerNorm and attention, each with its backends. The optional NVIDIA apex is imported here and nowhere else."""

import importlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcfg.common.files import InputError
from pretraining.model.config import ModelConfig

ACTIVATION_FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "swish": F.silu}

APEX_HELP = (
    "NVIDIA apex is not installed (the package of that name on PyPI is another project). Build it where CUDA is: "
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def import_apex(module: str, flag: str):
    """A module of apex.

    Raises:
        InputError: apex is not there; says how to build it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{flag} apex: {module} can't be imported ({error}). {APEX_HELP}") from None


def layer_norm(config: ModelConfig) -> nn.Module:
    """A normalisation over the last dimension, of width `hidden_size`."""
    if config.layer_norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    if config.layer_norm_type == "apex":
        fused = import_apex("apex.normalization", "--layer_norm_type").FusedLayerNorm
        return fused(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def eager_attention(query, key, value, mask, dropout):
    """softmax(Q K^T / sqrt(d)) V in plain operations, which can be differentiated twice and by `torch.func`.

    Args:
        query, key, value: (batch, heads, length, head_dim).
        mask: (batch, 1, 1, length) bool, True where a key may be looked at; or None.
        dropout: probability of dropping an attention weight.

    Returns:
        (batch, heads, length, head_dim).
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (batch, heads, length, length)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(-1), dropout, training=dropout > 0) @ value


def sdpa_attention(query, key, value, mask, dropout):
    """`eager_attention` by PyTorch's kernels."""
    if query.device.type == "cpu":
        # On short sentences the CPU's flash kernel is 1.3 to 1.6 times slower than this one.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def apex_attention(query, key, value, mask, dropout):
    """`eager_attention` with apex's fused scale-mask-softmax, which takes its own fallback for shapes it has no kernel for."""
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


# Chosen positions a sentence, in the mean, up to which keys and values are copied for each: that is faster for few.
MOST_COPIES = 8
ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "eager": eager_attention, "apex": apex_attention}


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)  # rows of the query, then the key, then the value
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob
        if config.attention == "apex":
            import_apex("apex.transformer.functional", "--attention")  # missing: said when the model is built
        self.attend = ATTENTION_FUNCTIONS[config.attention]

    def forward(self, hidden, mask, chosen=None):
        """Attention of every position, or of those `chosen`, to all positions of its sentence.

        Args:
            hidden: (batch, length, hidden).
            mask: (batch, 1, 1, length) bool, True at tokens; None where nothing is padded.
            chosen: (M,) int64 indices into the flattened (batch * length); None for all positions.

        Returns:
            (batch, length, hidden), or (M, 1, hidden) for `chosen`.
        """
        batch, length, width = hidden.shape
        split = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (batch, heads, length, head_dim) each
        if chosen is not None and len(chosen) > MOST_COPIES * batch:
            return self._by_sentence(query, key, value, mask, chosen)
        if chosen is not None:
            query = split[:, :, 0].flatten(0, 1)[chosen].unsqueeze(2)  # (M, heads, 1, head_dim)
            sentence = chosen // length
            key, value = key[sentence], value[sentence]
            mask = None if mask is None else mask[sentence]
        context = self.attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.output(context.transpose(1, 2).flatten(2))

    def _by_sentence(self, query, key, value, mask, chosen):
        """What `forward` gives for `chosen`, without a copy of a sentence's keys and values for each of its positions.

        The chosen positions of a sentence are its queries, (batch, heads, most, head_dim) with `most` the most of a sentence.
        """
        batch, heads, length, size = query.shape
        sentence, order = chosen // length, chosen.argsort()
        counts = sentence.bincount(minlength=batch)
        column = torch.empty_like(chosen)  # of each position among those of its sentence
        column[order] = torch.arange(len(chosen), device=chosen.device) - (counts.cumsum(0) - counts)[sentence[order]]
        queries = query.new_zeros(batch, int(counts.max()), heads, size)
        queries = queries.index_put((sentence, column), query.transpose(1, 2).flatten(0, 1)[chosen])
        context = self.attend(queries.transpose(1, 2), key, value, mask, self.dropout if self.training else 0.0)
        return self.output(context.transpose(1, 2)[sentence, column].flatten(1).unsqueeze(1))
