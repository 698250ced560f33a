"""The statistics of the report: 95% intervals of differences of means, p-values, seeds that would decide, and correlations.

Differences of means over seeds follow Student's t, with the degrees of freedom of Welch and Satterthwaite where two groups of
other seeds are compared. p-values are two-sided, and Holm's correction keeps the chance of one false verdict in a family at 5%
(Holm 1979, Scandinavian Journal of Statistics 6). Correlations have percentile intervals of a bootstrap that draws whole runs,
since checkpoints of one run are not independent (Davison and Hinkley, Bootstrap Methods, section 3.8).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pcfg.common.files import keyed_rng
from pcfg.common.schema import Schema
from pretraining.report.same_loss import LEVEL

TAIL = (1 + LEVEL) / 2
Method = Literal["paired", "Welch", "one sample"]
NO_SPREAD = 1e-12  # standard error, relative to the value, below which all differences count as equal
DRAWS = 10_000
SEED = 0  # of the bootstrap
FEWEST = 4  # models of a correlation
MOST_SEEDS = 1000  # that `required_seeds` considers


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its standard error; None and 0 degrees of freedom where a single value has none."""

    value: float
    error: float | None
    degrees: float  # of freedom of the error; infinite for an error over sentences
    n: int  # number of values

    @property
    def deviations(self) -> tuple[float, ...]:
        """The standard deviation of the values; empty for a single one."""
        return () if self.error is None else (self.error * math.sqrt(self.n),)


def mean_of(values: ArrayLike) -> Mean:
    """Mean of independent values (one per seed), s / sqrt(n) its standard error.

    >>> mean_of([1.0, 3.0])
    Mean(value=2.0, error=1.0, degrees=1, n=2)
    """
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Mean(float(array.mean()), error, len(array) - 1, len(array))


class Change(Schema):
    """A difference with its 95% interval."""

    # value, error, low, high: in the unit of what was subtracted; the last two None where there is no interval
    value: float
    error: float | None
    low: float | None = None
    high: float | None = None
    degrees: float | None = None  # of freedom of Student's t; None for the normal distribution, and where there is no interval
    n: tuple[int, ...]  # number of values on either side, or of pairs
    method: Method
    deviations: tuple[float, ...] = ()  # standard deviations over seeds: of the pairs' differences, or of either side

    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0; also 0 where there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def reach(self) -> float | None:
        """The larger absolute end of the interval: no effect beyond it is compatible with the data."""
        return None if self.low is None or self.high is None else max(abs(self.low), abs(self.high))

    def p_value(self, null: float = 0.0) -> float | None:
        """Two-sided p-value of the hypothesis that the difference is `null`; None without an interval."""
        if self.low is None or not self.error:
            return None
        return float(2 * stats.t.sf(abs(self.value - null) / self.error, math.inf if self.degrees is None else self.degrees))

    def equivalence_p(self, margin: float) -> float | None:
        """p-value of the hypothesis that the difference lies outside +-`margin`: twice the larger of the two one-sided ones.

        It is below 0.05 where the 95% interval lies inside +-`margin` (Schuirmann 1987, at half his level).
        """
        nearest = self.p_value(math.copysign(margin, self.value))
        return nearest if nearest is None or abs(self.value) < margin else 1.0


def _change(
    value: float, error: float | None, degrees: float, n: tuple[int, ...], method: Method, deviations: tuple[float, ...] = ()
) -> Change:
    """The interval of a difference. Without any spread there is none: a few equal accuracies do not prove a variance of 0.

    Nor does a spread of rounding: 0.75 - 0.7 and 0.65 - 0.6 differ in their last digit.
    """
    change = Change(value=value, error=error, n=n, method=method)
    if not error or error <= NO_SPREAD * max(1.0, abs(value)):
        return change
    half = float(stats.t.ppf(TAIL, degrees)) * error
    ends = {"low": value - half, "high": value + half, "degrees": float(degrees) if math.isfinite(degrees) else None}
    return change.model_copy(update={**ends, "deviations": deviations})


def paired_change(before: ArrayLike, after: ArrayLike) -> Change:
    """Mean of `after` - `before` over pairs (one per seed), t interval with n - 1 degrees of freedom; none for one pair."""
    mean = mean_of(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    return _change(mean.value, mean.error, mean.degrees, (mean.n,), "paired", mean.deviations)


def change_of_means(before: Mean, after: Mean) -> Change:
    """Difference `after` - `before` of two independent means (Welch), none where one of them has no error.

    Degrees of freedom: (v_1 + v_2)^2 / (v_1^2 / df_1 + v_2^2 / df_2), v the squared errors; df may be infinite.
    """
    n = (before.n, after.n)
    if before.error is None or after.error is None:
        return _change(after.value - before.value, None, 0, n, "Welch")
    squares = [(before.error**2, before.degrees), (after.error**2, after.degrees)]
    total = sum(square for square, _ in squares)
    below = sum(square**2 / degrees for square, degrees in squares)
    degrees = total**2 / below if below else math.inf
    deviations = before.deviations + after.deviations if min(n) > 1 else ()
    return _change(after.value - before.value, math.sqrt(total), degrees, n, "Welch", deviations)


def change_to_number(before: ArrayLike, number: float) -> Change:
    """`number` less the mean of values (one per seed), with the t interval of that mean; the number counts as exact."""
    mean = mean_of(before)
    return _change(number - mean.value, mean.error, mean.degrees, (mean.n,), "one sample", mean.deviations)


def required_seeds(change: Change, margin: float) -> int | None:
    """The fewest seeds with which the interval would lie off 0 or inside +-`margin`, for the same mean and spread.

    With n seeds (on either side, for Welch) and deviations s_i the error is sqrt(sum s_i^2 / n), and the degrees of freedom are
    (n - 1) (sum s_i^2)^2 / sum s_i^4. None if more than `MOST_SEEDS` are required, or no spread is known.
    """
    if not change.deviations:
        return None
    squares = np.square(change.deviations)
    seeds = np.arange(2, MOST_SEEDS + 1)
    degrees = (seeds - 1) * squares.sum() ** 2 / np.square(squares).sum()
    half = stats.t.ppf(TAIL, degrees) * np.sqrt(squares.sum() / seeds)
    decided = seeds[(half < abs(change.value)) | (half + abs(change.value) <= margin)]
    return int(decided[0]) if len(decided) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of one family, in its order.

    The k-th smallest of m is multiplied by m - k + 1; none is less than a smaller one's, none above 1.

    >>> holm([0.01, 0.04, 0.02])
    [0.03, 0.04, 0.04]
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


class Correlation(Schema):
    """Rank correlation of two columns over models."""

    n: int  # models
    runs: int  # that they come from
    spearman: float | None = None  # None where there are fewer than `FEWEST` models or one column has no spread
    spearman_interval: tuple[float, float] | None = None  # None too where there is one run


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mid-ranks of samples in which value i occurs counts[b, i] times: (draws, n). Exact, halves included."""
    below = (values[:, None] < values[None, :]) + 0.5 * (values[:, None] == values[None, :])  # (n, n): j below i
    return counts @ below + 0.5


def _spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rank correlation of samples in which the pair (x_i, y_i) occurs counts[b, i] times: (draws,), NaN without spread.

    Which samples have spread is decided exactly, by comparing ranks: a sum of squares of equal values rounds to more than 0.
    """
    drawn = counts > 0
    spread = np.ones(len(counts), bool)
    centred = []
    for values in (_ranks(x, counts), _ranks(y, counts)):
        spread &= np.where(drawn, values, -np.inf).max(1) > np.where(drawn, values, np.inf).min(1)
        centred.append(values - (counts * values).sum(1, keepdims=True) / counts.sum(1, keepdims=True))
    a, b = centred
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (counts * a * b).sum(1) / np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
    return np.where(spread, np.clip(r, -1.0, 1.0), np.nan)


def correlate(x: ArrayLike, y: ArrayLike, runs: Sequence[str], purpose: str, draws: int = DRAWS) -> Correlation:
    """The rank correlation of x and y over models, and its bootstrap interval.

    A draw takes as many runs as there are, with replacement, each with all its models; ties get mid-ranks. All draws are made
    at once, as counts of how often each model occurs.

    Args:
        x, y: (n,) numbers.
        runs: (n,) a label per model; models of one label are drawn together.
        purpose: keys the random numbers, so that one correlation does not depend on which others are computed.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    labels = list(dict.fromkeys(runs))
    member = np.array([[label == run for run in runs] for label in labels], np.float64).reshape(len(labels), len(x))
    result = Correlation(n=len(x), runs=len(labels))
    if len(x) < FEWEST or x.min() == x.max() or y.min() == y.max():
        return result

    (spearman,) = _spearman(x, y, np.ones((1, len(x)))).tolist()
    if len(labels) == 1:
        return result.model_copy(update={"spearman": spearman})
    rng = keyed_rng(SEED, f"bootstrap, {purpose}")
    counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=draws) @ member  # (draws, n)
    drawn = _spearman(x, y, counts)
    interval = tuple(np.nanquantile(drawn, (1 - TAIL, TAIL)).tolist()) if not np.isnan(drawn).all() else None
    return result.model_copy(update={"spearman": spearman, "spearman_interval": interval})
