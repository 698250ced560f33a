"""The parameters that the trace of the Hessian is over, and the parts that it is reported in."""

import re

import numpy as np
import torch

# As in the released code; the model has no pooler.
LEFT_OUT = ("decoder_bias",)
TABLES = {
    "embeddings.words.weight": "word_table",  # as the input and as the decoder, with their cross term
    "embeddings.positions.weight": "position_table",
    "embeddings.token_types.weight": "token_type_table",
}
GROUPS = (*TABLES.values(), "encoder_matrices", "vectors", "head")


def measured_parameters(model) -> dict:
    """The parameters that the trace is over, by name: all but those in `LEFT_OUT`, the tied word table once."""
    return {name: parameter for name, parameter in model.named_parameters() if name not in LEFT_OUT}


def group_of(name: str) -> str:
    """Which of `GROUPS` a parameter is in.

    >>> group_of("layers.0.attention.qkv.weight"), group_of("layers.0.attention.qkv.bias"), group_of("head_dense.bias")
    ('encoder_matrices', 'vectors', 'head')
    """
    if name in TABLES:
        return TABLES[name]
    if name.startswith("head_"):
        return "head"
    return "vectors" if name.endswith(".bias") or "norm" in name else "encoder_matrices"


def layer_of(name: str) -> str:
    """Which layer a parameter is in: "embeddings" (the word table's part as the decoder included), "layer_0", .., "head".

    >>> layer_of("layers.3.output.weight"), layer_of("final_norm.bias"), layer_of("head_norm.weight")
    ('layer_3', 'final_norm', 'head')
    """
    if match := re.match(r"layers\.(\d+)\.", name):
        return f"layer_{match[1]}"
    return "head" if name.startswith("head_") else name.split(".")[0]


class Parts:
    """Columns of a table of values: the whole, then its groups, then its layers; each partition sums to the whole.

    Args:
        model: a `MaskedLM`.

    Attributes:
        names: the measured parameters, in the order in which `columns` takes their values.
        groups, layers: the names of the parts.
        parameters: how many numbers the trace is over.
    """

    def __init__(self, model):
        measured = measured_parameters(model)
        self.names = list(measured)
        self.parameters = sum(parameter.numel() for parameter in measured.values())
        self.groups = [group for group in GROUPS if group in set(map(group_of, self.names))]
        self.layers = list(dict.fromkeys(map(layer_of, self.names)))
        sums = [[1.0] * len(self.names)]
        sums += [[float(group_of(name) == group) for name in self.names] for group in self.groups]
        sums += [[float(layer_of(name) == layer) for name in self.names] for layer in self.layers]
        self._sums = np.array(sums).T  # (parameters, columns)

    def __len__(self) -> int:
        return self._sums.shape[1]

    def stack(self, values: dict) -> torch.Tensor:
        """Values (m,) of each parameter, by its name, as (m, parameters) float64.

        Raises:
            KeyError: a parameter has none.
        """
        return torch.stack([values[name] for name in self.names], -1).double()

    def columns(self, values: np.ndarray) -> np.ndarray:
        """(..., parameters) float64 -> (..., columns)."""
        return values @ self._sums

    def described(self, means, errors) -> dict:
        """{"groups": {name: {"value", "standard_error"}}, "layers": {...}} of the columns after the first."""
        named = [{"value": float(mean), "standard_error": float(error)} for mean, error in zip(means, errors, strict=True)]
        edge = 1 + len(self.groups)
        groups, layers = zip(self.groups, named[1:edge], strict=True), zip(self.layers, named[edge:], strict=True)
        return {"groups": dict(groups), "layers": dict(layers)}
