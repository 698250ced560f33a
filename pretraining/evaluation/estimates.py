"""Estimates of a trace as means over independent units: standard errors, parts, differences, and when to stop."""

import dataclasses

import numpy as np

from pcfg.common.files import InputError
from pretraining.evaluation.parts import LEFT_OUT, Parts


def mean_and_error(values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over sentences and their standard errors, from values of independent units.

    Args:
        values: (n, columns), the mean of each unit's sentences.
        sizes: (n,) sentences of each unit.

    Returns:
        The mean R = sum s_i y_i / sum s_i, and sqrt(n / (n - 1) sum s_i^2 (y_i - R)^2) / sum s_i (Cochran, Sampling
        Techniques, section 2.11), (columns,) each.

    Raises:
        InputError: there are fewer than two units.

    >>> mean_and_error(np.array([[1.0], [3.0]]), np.array([1, 1]))
    (array([2.]), array([1.]))
    """
    number, total = len(values), sizes.sum()
    if number < 2:
        raise InputError(
            f"--nsamples: {number} sentence, or block of sentences, has no standard error; it takes at least 2 of them"
        )
    mean = sizes @ values / total
    spread = ((values - mean) * sizes[:, None]) ** 2
    return mean, np.sqrt(spread.sum(0) * number / (number - 1)) / total


def whole(values: np.ndarray, sizes: np.ndarray) -> dict:
    """Mean and standard error of the first column."""
    mean, error = mean_and_error(values[:, :1], sizes)
    return {"value": float(mean[0]), "standard_error": float(error[0])}


@dataclasses.dataclass
class Estimate:
    """An estimate of the trace.

    Attributes:
        parts: what the columns are.
        values: (n, columns) float64, mean over each unit's sentences; a unit is a sentence (fisher) or a block (hutchinson).
        sizes: (n,) int64, sentences of each unit.
        contexts: masked positions measured.
        draws: labels or probes in all.
        target: the relative error that was asked for, if one was.
        true_values: as `values`, with labels by the true conditionals; None where they are unknown, or for hutchinson.
    """

    parts: Parts
    values: np.ndarray
    sizes: np.ndarray
    contexts: int
    draws: int
    target: float | None
    true_values: np.ndarray | None = None

    @property
    def sentences(self) -> int:
        return int(self.sizes.sum())

    def described(self) -> dict:
        """The fields of a record."""
        means, errors = mean_and_error(self.values, self.sizes)
        fields = {
            "value": float(means[0]),
            "standard_error": float(errors[0]),
            "n": len(self.values),
            "sentences": self.sentences,
            "contexts": self.contexts,
            "draws": self.draws,
            "mean": "over sentences of the mean over their masked positions",
            "parameters": self.parts.parameters,
            "left_out": list(LEFT_OUT),
            "parts": self.parts.described(means, errors),
        }
        if self.target is not None:
            fields["relative_error"] = float(errors[0] / abs(means[0]))
            fields["target_reached"] = is_reached(self.values, self.sizes, self.target)
        if self.true_values is not None:
            true = whole(self.true_values, self.sizes)
            fields["true_labels"] = {**true, "difference": whole(self.values - self.true_values, self.sizes)}
        return fields


def difference(fisher: Estimate, hutchinson: Estimate) -> dict | None:
    """Fisher's trace minus Hutchinson's, on the blocks of sentences that both have: value, standard error, blocks (n).

    None if these are fewer than two.
    """
    both = int((np.cumsum(hutchinson.sizes) <= fisher.sentences).sum())
    if both < 2:
        return None
    sizes = hutchinson.sizes[:both]
    starts = np.cumsum(sizes) - sizes
    in_blocks = np.add.reduceat(fisher.values[: sizes.sum()], starts) / sizes[:, None]
    return {**whole(in_blocks - hutchinson.values[:both], sizes), "n": both}


def stops(total: int, first: int, target: float | None) -> list[int]:
    """Numbers of units after which to look at the error: first, 2 first, 4 first, .., total; without a target only total.

    >>> stops(1000, 200, 0.01)
    [200, 400, 800, 1000]
    """
    numbers = []
    while target is not None and first < total:
        numbers.append(first)
        first *= 2
    return [*numbers, total]


def is_reached(values: np.ndarray, sizes: np.ndarray, target: float | None) -> bool:
    """Whether the relative standard error of the first column is `target` or less; without a target it always is."""
    if target is None:
        return True
    mean, error = mean_and_error(values[:, :1], sizes)
    return bool(error[0] <= target * abs(mean[0]))
