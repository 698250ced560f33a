"""A small transformer seen as a large one: the same function in the parameters of a wider, maybe deeper model.

Liu et al. 2023, section 4.3 and appendix: traces of models of different sizes are compared in one parameterisation. The hidden
vector of the large model is K copies of the small one's, h' = (h, .., h). It follows that

    word, position and token-type tables    tiled K times along the hidden dimension
    matrices W (out, in)                    tiled K x K and divided by K: sum over K copies of W h / K
    vectors (biases, LayerNorm)             tiled K times
    decoder                                 is the word table, so K copies of e h add up to K times a logit. Either all tables
                                            are divided by K (the released code; the embedding LayerNorm restores the scale of
                                            what goes into the encoder), or the MLM head's LayerNorm is
    heads                                   K times as many of the same size: each copy attends by itself. Or fewer, down to
                                            as many as before: each holds several copies of one small head, g = K / (ratio of
                                            their numbers), its rows brought together. Its scores q k / sqrt(g d) are then
                                            sqrt(g) times the small one's, hence queries are divided by sqrt(g)
    further feed-forward units              all zero, on both sides
    further positions                       zero; no sentence of the small model reaches them
    added layers                            all zero, LayerNorm weights included: h + 0 in pre-LN, after the last layer

up to rounding and, where the tables are divided, the embedding LayerNorm's epsilon, which is not. None of this is the only way,
and the trace depends on it. The trace E sum_w f(w) ||grad log f(w)||^2 of the small model's parts becomes

    part                                    tables divided      head's LayerNorm divided
    tables                                  K times             a K-th
    matrices (queries: g times)             as it was           as it was
    vectors                                 a K-th              a K-th; of the MLM head's LayerNorm K times
    added layers                            what their output biases bring

since every copy of an output has a K-th of its gradient.
"""

import copy
import dataclasses
import math

import torch

from pcfg.common.files import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

LOGIT_TOLERANCE = 1e-4  # float32, on random sentences
TABLES = ("embeddings.words.weight", "embeddings.positions.weight", "embeddings.token_types.weight")
TIED_SCALES = ("tables", "head")


@dataclasses.dataclass(frozen=True)
class Growth:
    """From one shape to another.

    Args:
        small, large: the two shapes.
        tied_scale: what is divided by K, "tables" or "head" (the MLM head's LayerNorm).

    Attributes:
        times: K, copies of the hidden vector.
        copies: g, copies of one small head in a head of the large model.

    Raises:
        InputError: the small model can't be seen as one of that shape; names each number that is in the way.
    """

    small: ModelConfig
    large: ModelConfig
    tied_scale: str = "tables"

    @property
    def times(self) -> int:
        return self.large.hidden_size // self.small.hidden_size

    @property
    def copies(self) -> int:
        return self.times * self.small.num_attention_heads // self.large.num_attention_heads

    @property
    def added_layers(self) -> list[int]:
        return list(range(self.small.num_hidden_layers, self.large.num_hidden_layers))

    def __post_init__(self):
        small, large, problems = self.small, self.large, []
        times, rest = divmod(large.hidden_size, small.hidden_size)
        if rest or not times:
            problems.append(f"hidden_size is {large.hidden_size}, needs a multiple of {small.hidden_size}")
        elif times * small.num_attention_heads % large.num_attention_heads or (
            large.num_attention_heads % small.num_attention_heads
        ):
            problems.append(
                f"num_attention_heads is {large.num_attention_heads}, needs {times} x {small.num_attention_heads} = "
                f"{times * small.num_attention_heads} (heads of the same size), {small.num_attention_heads} (as many), or a "
                f"multiple of the latter that divides the former"
            )
        least = times * small.intermediate_size
        if large.intermediate_size < least:
            wanted = f"{times} x {small.intermediate_size} = {least} or more"
            problems.append(f"intermediate_size is {large.intermediate_size}, needs {wanted}")
        for name in ("max_position_embeddings", "num_hidden_layers"):
            if getattr(large, name) < getattr(small, name):
                problems.append(f"{name} is {getattr(large, name)}, less than the small model's {getattr(small, name)}")
        for name in (
            *("vocab_size", "type_vocab_size", "hidden_act"),
            *("encoder_ln_mode", "layer_norm_type", "layer_norm_eps"),
        ):
            if getattr(large, name) != getattr(small, name):
                problems.append(f"{name} is {getattr(large, name)!r}, the small model has {getattr(small, name)!r}")
        if self.added_layers and small.encoder_ln_mode != "pre-ln":
            problems.append("layers can be added to pre-LN models only: in post-LN a layer of zeros is not the identity")
        if problems:
            raise InputError("the small model can't be seen as the large one: " + "; ".join(problems))

    def facts(self) -> dict:
        """What was done, for `args.json`."""
        return {
            "rule": self.tied_scale,
            "times": self.times,
            "heads": self.large.num_attention_heads // self.small.num_attention_heads,
            "added_layers": self.added_layers,
            "added_units": self.large.intermediate_size - self.times * self.small.intermediate_size,
            "added_positions": self.large.max_position_embeddings - self.small.max_position_embeddings,
        }

    def parameter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The large model's parameter `name`, without what is zero: see the module's table."""
        if name == "decoder_bias":
            return tensor  # one number a word, of no hidden dimension
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
        """A matrix tiled in the given directions and divided; a vector, whose rows are there already, as it is."""
        if tensor.dim() == 1:
            return tensor
        return tensor.repeat(self.times if rows else 1, self.times if columns else 1) / self.times

    def _head_rows(self) -> torch.Tensor:
        """(K hidden,) int64: the small model's row of each row of the large model's queries, keys and values."""
        heads, width = self.small.num_attention_heads, self.small.hidden_size
        by_head = torch.arange(width).view(heads, 1, width // heads)
        return by_head.expand(heads, self.copies, -1).reshape(-1).repeat(self.times // self.copies)


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`tensor` in the first rows and columns of zeros of `shape`."""
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def enlarge(small: MaskedLM, growth: Growth) -> MaskedLM:
    """The model of the large shape that computes what `small` computes.

    Args:
        small: a `MaskedLM` of the small shape; it is not changed.

    Returns:
        A new model in eval mode, of the small one's dtype; the small one's dropouts.
    """
    dropouts = {name: getattr(small.config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    large = MaskedLM(dataclasses.replace(growth.large, **dropouts, attention=small.config.attention))
    large = large.to(next(small.parameters()).dtype)
    copied = {name: growth.parameter(name, tensor) for name, tensor in small.state_dict().items()}
    nothing = torch.zeros(())
    state = {
        name: _padded(copied[name], tensor.shape) if name in copied else nothing.to(tensor).expand(tensor.shape)
        for name, tensor in large.state_dict().items()
    }
    large.load_state_dict(state)
    return large.eval()


@torch.inference_mode()
def largest_logit_difference(a: MaskedLM, b: MaskedLM, positions: int, sentences: int = 64) -> float:
    """max |logits of a - logits of b| over random sentences, among them of 1 and of `positions` tokens; NaN if any is."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for length in sorted({1, *(max(1, positions >> shift) for shift in range(8)), positions}):
        ids = torch.randint(a.config.vocab_size, (max(1, sentences // length), length), generator=generator)
        differences.append((a.predict(a.encode(ids)) - b.predict(b.encode(ids))).abs().max())
    return torch.stack(differences).max().item()


def logit_differences(small: MaskedLM, growth: Growth) -> dict:
    """How far the enlarged model is from the small one: largest differences of a logit, in eval mode.

    Returns:
        "float32": as the models are used. "float64": without rounding to speak of; what is left is the embedding LayerNorm's
        epsilon. "rounding": float64, with that epsilon divided by K^2 as the variance of the divided tables is. "epsilon":
        what the epsilon makes, float64 models with it as it is and divided.
    """
    positions = small.config.max_position_embeddings
    exact = copy.deepcopy(small.eval()).double()
    enlarged = enlarge(exact, growth)
    scaled = copy.deepcopy(enlarged)
    if growth.tied_scale == "tables":
        scaled.embeddings.norm.eps /= growth.times**2
    return {
        "float32": largest_logit_difference(small, enlarge(small, growth), positions),
        "float64": largest_logit_difference(exact, enlarged, positions),
        "rounding": largest_logit_difference(exact, scaled, positions),
        "epsilon": largest_logit_difference(enlarged, scaled, positions),
    }
