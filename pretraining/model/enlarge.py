"""A small transformer as a large one: the same function in the parameters of a wider, possibly deeper model.

Liu et al. 2023, section 4.3 and appendix: traces of models of different sizes are compared in one parameterisation. The hidden
vector of the large model is K copies of the small one's, h' = (h, .., h). It follows that

    word, position and token-type tables    tiled K times along the hidden dimension
    matrices W (out, in)                    tiled K x K and divided by K: sum over K copies of W h / K
    vectors (biases, LayerNorm)             tiled K times
    decoder                                 is the word table, so K copies of e h add up to K times a logit. Either all tables
                                            are divided by K (the released code; the embedding LayerNorm restores the scale of
                                            the encoder's input), or the MLM head's LayerNorm
    heads                                   K times as many of the same size: each copy attends by itself. Or fewer, down to the
                                            small number: each holds g = K / (ratio of their numbers) copies of one small head,
                                            with adjacent rows. Its scores q k / sqrt(g d) would be sqrt(g) times the small
                                            one's, hence queries are divided by sqrt(g)
    additional feed-forward units           all zero, on both sides
    additional positions                    zero; no sentence of the small model reaches them
    added layers                            all zero, LayerNorm weights included: h + 0 in pre-LN, after the last layer

up to rounding and, with divided tables, the embedding LayerNorm's epsilon, which is not divided. Other ways exist; the trace
depends on the way. The trace E sum_w f(w) ||grad log f(w)||^2 of the small model's parts is multiplied by

    part                                    tables divided      head's LayerNorm divided
    tables                                  K                   1 / K
    matrices (queries: g)                   1                   1
    vectors                                 1 / K               1 / K; the MLM head's LayerNorm: K
    added layers                            the trace of their output biases is added

since every copy of an output has 1 / K of its gradient. Two numbers of `pretraining.evaluation.flatness` do not depend on the
rule: the relative flatness R is the small model's, the balanced trace is that of the small model's parts with V / K. Heads of
another size change both by the queries' part; added layers change the balanced trace by their output biases, and not R.
"""

import copy
import dataclasses
import math
from typing import Any

import torch

from pcfg.common.files import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

LOGIT_TOLERANCE = 1e-4  # float32, on random sentences
TABLES = ("embeddings.words.weight", "embeddings.positions.weight", "embeddings.token_types.weight")
TIED_SCALES = ("tables", "head")


@dataclasses.dataclass(frozen=True)
class Growth:
    """The step from one shape to another."""

    small: ModelConfig
    large: ModelConfig
    tied_scale: str = "tables"  # what is divided by K: "tables" or "head" (the MLM head's LayerNorm)

    @property
    def times(self) -> int:
        """K, copies of the hidden vector."""
        return self.large.hidden_size // self.small.hidden_size

    @property
    def copies(self) -> int:
        """g, copies of one small head in a head of the large model."""
        return self.times * self.small.num_attention_heads // self.large.num_attention_heads

    @property
    def added_layers(self) -> list[int]:
        return list(range(self.small.num_hidden_layers, self.large.num_hidden_layers))

    def __post_init__(self):
        small = self.small
        large = self.large
        heads = small.num_attention_heads
        problems = []
        times, rest = divmod(large.hidden_size, small.hidden_size)
        if rest or not times:
            problems.append(f"hidden_size is {large.hidden_size}, needs a multiple of {small.hidden_size}")
        elif times * heads % large.num_attention_heads or large.num_attention_heads % heads:
            problems.append(
                f"num_attention_heads is {large.num_attention_heads}, needs {times} x {heads} = {times * heads} "
                f"(heads of the same size), {heads} (as many), or a multiple of the latter that divides the former"
            )
        least = times * small.intermediate_size
        if large.intermediate_size < least:
            product = f"{times} x {small.intermediate_size}"
            problems.append(f"intermediate_size is {large.intermediate_size}, needs {product} = {least} or more")
        for name in ("max_position_embeddings", "num_hidden_layers"):
            if getattr(large, name) < getattr(small, name):
                problems.append(f"{name} is {getattr(large, name)}, less than the small model's {getattr(small, name)}")
        for name in ("vocab_size", "type_vocab_size", "hidden_act", "encoder_ln_mode", "layer_norm_type", "layer_norm_eps"):
            if getattr(large, name) != getattr(small, name):
                problems.append(f"{name} is {getattr(large, name)!r}, the small model has {getattr(small, name)!r}")
        if self.added_layers and small.encoder_ln_mode != "pre-ln":
            problems.append("layers can be added to pre-LN models only: in post-LN a layer of zeros is not the identity")
        if problems:
            raise InputError("the small model can't be seen as the large one: " + "; ".join(problems))

    def facts(self) -> dict:
        """The rule and what was added, for `args.json`."""
        return {
            "rule": self.tied_scale,
            "times": self.times,
            "heads": self.large.num_attention_heads // self.small.num_attention_heads,
            "added_layers": self.added_layers,
            "added_units": self.large.intermediate_size - self.times * self.small.intermediate_size,
            "added_positions": self.large.max_position_embeddings - self.small.max_position_embeddings,
        }

    def parameter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The large model's parameter `name` without its zeros: see the module's table."""
        if name == "decoder_bias":
            return tensor  # one number per word, without a hidden dimension
        if name in TABLES:
            return tensor.repeat(1, self.times) / (self.times if self.tied_scale == "tables" else 1)
        if ".qkv." in name:
            query, key, value = (self._matrix(rows[self._head_rows()], rows=False) for rows in tensor.chunk(3))
            return torch.cat([query / math.sqrt(self.copies), key, value])
        if name.endswith("attention.output.weight"):
            return self._matrix(tensor[:, self._head_rows()], columns=False)
        if tensor.dim() == 2:
            return self._matrix(tensor)
        if name.startswith("head_norm.") and self.tied_scale == "head":
            return tensor.repeat(self.times) / self.times
        return tensor.repeat(self.times)

    def _matrix(self, tensor: torch.Tensor, rows: bool = True, columns: bool = True) -> torch.Tensor:
        """A matrix tiled in the given directions and divided; a vector, whose rows are copied already, unchanged."""
        if tensor.dim() == 1:
            return tensor
        return tensor.repeat(self.times if rows else 1, self.times if columns else 1) / self.times

    def _head_rows(self) -> torch.Tensor:
        """(K hidden,) int64: the small model's row of each row of the large model's queries, keys and values."""
        heads = self.small.num_attention_heads
        width = self.small.hidden_size
        by_head = torch.arange(width).view(heads, 1, width // heads)
        return by_head.expand(heads, self.copies, -1).reshape(-1).repeat(self.times // self.copies)


def enlarge(small: MaskedLM, growth: Growth) -> MaskedLM:
    """A new model of the large shape that computes the same function as `small`: in eval mode, with its dtype and dropouts."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention")
    large = MaskedLM(dataclasses.replace(growth.large, **{name: getattr(small.config, name) for name in names}))
    large = large.to(next(small.parameters()).dtype)
    state = small.state_dict()
    for name, tensor in large.state_dict().items():  # these share their memory with the parameters
        tensor.zero_()
        if name in state:
            copied = growth.parameter(name, state[name])
            tensor[tuple(slice(size) for size in copied.shape)] = copied
    return large.eval()


@torch.inference_mode()
def largest_logit_difference(a: MaskedLM, b: MaskedLM, positions: int) -> float:
    """max |logits of a - logits of b| over random sentences of up to `positions` tokens; NaN if any logit is."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for length in sorted({1, *(max(1, positions >> shift) for shift in range(8)), positions}):
        ids = torch.randint(a.config.vocab_size, (max(1, 64 // length), length), generator=generator)
        differences.append((a.predict(a.encode(ids)) - b.predict(b.encode(ids))).abs().max())
    return torch.stack(differences).max().item()


def logit_differences(small: MaskedLM, growth: Growth) -> dict:
    """Distance of the enlarged model from the small one: largest differences of a logit, in eval mode.

    Returns:
        "float32": as the models are used. "float64": almost without rounding; the embedding LayerNorm's epsilon remains.
        "rounding": float64, with that epsilon divided by K^2, like the variance of the divided tables. "epsilon": the effect of
        the epsilon, between float64 models with the original and the divided one.
    """
    positions = small.config.max_position_embeddings
    exact = copy.deepcopy(small.eval()).double()
    enlarged = enlarge(exact, growth)
    scaled = copy.deepcopy(enlarged)
    if growth.tied_scale == "tables":
        norm: Any = scaled.embeddings.norm
        norm.eps /= growth.times**2
    return {
        "float32": largest_logit_difference(small, enlarge(small, growth), positions),
        "float64": largest_logit_difference(exact, enlarged, positions),
        "rounding": largest_logit_difference(exact, scaled, positions),
        "epsilon": largest_logit_difference(enlarged, scaled, positions),
    }
