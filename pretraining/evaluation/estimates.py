"""Estimates of a trace as means over independent units: parts of the parameters, standard errors, when to stop."""

import dataclasses
import re
from typing import Any

import numpy as np
import torch

from pcfg.common.files import InputError
from pretraining.model.bert import MaskedLM

# As in the released code; the model has no pooler.
LEFT_OUT = ("decoder_bias",)
TABLES = {
    "embeddings.words.weight": "word_table",  # as the input and as the decoder, with their cross term
    "embeddings.positions.weight": "position_table",
    "embeddings.token_types.weight": "token_type_table",
}
GROUPS = (*TABLES.values(), "encoder_matrices", "vectors", "head")


def measured_parameters(model: MaskedLM) -> dict[str, torch.nn.Parameter]:
    """The parameters in the trace, by name: all but those in `LEFT_OUT`, the tied word table once."""
    return {name: parameter for name, parameter in model.named_parameters() if name not in LEFT_OUT}


def group_of(name: str) -> str:
    """The member of `GROUPS` that a parameter belongs to.

    >>> group_of("layers.0.attention.qkv.weight"), group_of("layers.0.attention.qkv.bias"), group_of("head_dense.bias")
    ('encoder_matrices', 'vectors', 'head')
    """
    if name in TABLES:
        return TABLES[name]
    if name.startswith("head_"):
        return "head"
    return "vectors" if name.endswith(".bias") or "norm" in name else "encoder_matrices"


def layer_of(name: str) -> str:
    """The layer of a parameter: "embeddings" (with the word table's part as the decoder), "layer_0", .., "head".

    >>> layer_of("layers.3.output.weight"), layer_of("final_norm.bias"), layer_of("head_norm.weight")
    ('layer_3', 'final_norm', 'head')
    """
    if match := re.match(r"layers\.(\d+)\.", name):
        return f"layer_{match[1]}"
    return "head" if name.startswith("head_") else name.split(".")[0]


class Partitions:
    """The columns of a table of values: the whole trace, its groups, its layers. Each partition sums to the whole.

    Attributes:
        names: the measured parameters, in the order in which `columns` takes their values.
        groups, layers: names of the parts.
        parameters: count of the numbers that the trace is over.
    """

    def __init__(self, model: MaskedLM):
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

    def stack(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Values (m,) of each parameter, by its name, as (m, parameters) float64.

        Raises:
            KeyError: a parameter has no values.
        """
        return torch.stack([values[name] for name in self.names], -1).double()

    def columns(self, values: np.ndarray) -> np.ndarray:
        """(..., parameters) float64 -> (..., columns)."""
        return values @ self._sums

    def described(self, means: np.ndarray, errors: np.ndarray) -> dict[str, dict]:
        """{"groups": {name: {"value", "standard_error"}}, "layers": {...}} of the columns after the first."""
        parts = [{"value": float(mean), "standard_error": float(error)} for mean, error in zip(means, errors, strict=True)]
        end = 1 + len(self.groups)
        groups = dict(zip(self.groups, parts[1:end], strict=True))
        return {"groups": groups, "layers": dict(zip(self.layers, parts[end:], strict=True))}


def mean_and_error(values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over sentences and their standard errors, from values of independent units.

    Args:
        values: (n, columns), the mean over each unit's sentences; n is 2 or more.
        sizes: (n,) sentences of each unit.

    Returns:
        The mean R = sum s_i y_i / sum s_i, and sqrt(n / (n - 1) sum s_i^2 (y_i - R)^2) / sum s_i (Cochran, Sampling
        Techniques, section 2.11), (columns,) each.

    >>> mean_and_error(np.array([[1.0], [3.0]]), np.array([1, 1]))
    (array([2.]), array([1.]))
    """
    number = len(values)
    total = sizes.sum()
    if number < 2:
        raise InputError(
            f"--nsamples: {number} sentence, or block of sentences, has no standard error; it takes at least 2 of them"
        )
    mean = sizes @ values / total
    spread = ((values - mean) * sizes[:, None]) ** 2
    return mean, np.sqrt(spread.sum(0) * number / (number - 1)) / total


def whole(values: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Mean and standard error of the first column."""
    mean, error = mean_and_error(values[:, :1], sizes)
    return {"value": float(mean[0]), "standard_error": float(error[0])}


@dataclasses.dataclass
class Estimate:
    """An estimate of the trace."""

    partitions: Partitions  # meaning of the columns
    values: np.ndarray  # (n, columns) float64, mean over the sentences of a unit: a sentence (fisher), a block (hutchinson)
    sizes: np.ndarray  # (n,) int64, sentences of each unit
    contexts: int  # number of masked positions
    draws: int  # number of labels or probes
    target: float | None  # the relative error to stop at, or None
    true_values: np.ndarray | None = None  # fisher with labels from the true conditionals, if they are known

    @property
    def sentences(self) -> int:
        return int(self.sizes.sum())

    def described(self) -> dict[str, Any]:
        """Fields of a record."""
        means, errors = mean_and_error(self.values, self.sizes)
        fields = {
            "value": float(means[0]),
            "standard_error": float(errors[0]),
            "n": len(self.values),
            "sentences": self.sentences,
            "contexts": self.contexts,
            "draws": self.draws,
            "mean": "over sentences of the mean over their masked positions",
            "parameters": self.partitions.parameters,
            "left_out": list(LEFT_OUT),
            "parts": self.partitions.described(means, errors),
        }
        if self.target is not None:
            fields["relative_error"] = float(errors[0] / abs(means[0]))
            fields["target_reached"] = is_reached(self.values, self.sizes, self.target)
        if self.true_values is not None:
            true = whole(self.true_values, self.sizes)
            fields["true_labels"] = {**true, "difference": whole(self.values - self.true_values, self.sizes)}
        return fields


def difference(fisher: Estimate, hutchinson: Estimate) -> dict[str, float] | None:
    """Fisher's trace minus Hutchinson's, on the blocks of sentences that both have: value, standard error, blocks (n).

    None for fewer than two such blocks.
    """
    number = int((np.cumsum(hutchinson.sizes) <= fisher.sentences).sum())
    if number < 2:
        return None
    sizes = hutchinson.sizes[:number]
    starts = np.cumsum(sizes) - sizes
    in_blocks = np.add.reduceat(fisher.values[: sizes.sum()], starts) / sizes[:, None]
    return {**whole(in_blocks - hutchinson.values[:number], sizes), "n": number}


def stops(total: int, first: int, target: float | None) -> list[int]:
    """Numbers of units after which to check the error: first, 2 first, 4 first, .., total; without a target only total.

    >>> stops(1000, 200, 0.01)
    [200, 400, 800, 1000]
    """
    numbers = []
    while target is not None and first < total:
        numbers.append(first)
        first *= 2
    return [*numbers, total]


def is_reached(values: np.ndarray, sizes: np.ndarray, target: float | None) -> bool:
    """Whether the relative standard error of the first column is at most `target`; always without a target."""
    if target is None:
        return True
    mean, error = mean_and_error(values[:, :1], sizes)
    return bool(error[0] <= target * abs(mean[0]))
