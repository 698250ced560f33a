"""Means over positions and over sentences, with standard errors whose independent units are the sentences."""

import numpy as np
import numpy.typing as npt
from scipy import special

from pcfg.common.files import InputError


class SentenceMeans:
    """Means over positions or sentences, and their standard errors, from blocks of sentences.

    y_s is the sum of the values over sentence s, and T_s its length. With values at randomly chosen positions only, y_s is T_s
    times their mean: the mean over sentences stays without bias, that over pairs, a ratio, has one of order 1 / sentences.
    The state is the means of (y, T, y / T) over the sentences and the matrix of their centred second moments; the states of two
    blocks merge (Chan, Golub and LeVeque 1983). The first block's mean is subtracted from the values, as sums proportional to
    the length would hide their differences.

    >>> means = SentenceMeans()
    >>> _ = means.add(np.array([1.0, 1.0, 4.0]), np.array([2, 1]))
    >>> means.by_pairs()[0], means.by_sentences()[0]
    (2.0, 2.5)
    """

    def __init__(self):
        self.number = 0
        self._mean = np.zeros(3)
        self._moments = np.zeros((3, 3))
        self._origin = 0.0

    def add(self, values: npt.ArrayLike, counts: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> "SentenceMeans":
        """Add sentences; returns itself.

        Args:
            values: (sum of counts,), a sentence's positions one after the other.
            counts: (n,) values of each sentence, 1 or more.
            lengths: (n,) positions of each sentence; None for `counts`.
        """
        counts = np.asarray(counts, np.int64)
        sums = np.add.reduceat(np.asarray(values, np.float64), np.cumsum(counts) - counts)
        if lengths is None:
            lengths = counts
        else:
            lengths = np.asarray(lengths, np.int64)
            sums = sums * (lengths / counts)
        if self.number == 0:
            self._origin = sums.sum() / lengths.sum()
        sums -= self._origin * lengths
        facts = np.column_stack([sums, lengths, sums / lengths])  # (n, 3)
        mean = facts.mean(axis=0)
        number = len(lengths)
        facts -= mean
        shift = mean - self._mean
        total = self.number + number
        self._moments += facts.T @ facts + np.outer(shift, shift) * (self.number * number / total)
        self._mean += shift * (number / total)
        self.number = total
        return self

    def by_pairs(self) -> tuple[float, float]:
        """Mean over all (sentence, position) pairs, and its standard error with sentences as clusters.

        The mean is R = sum y_s / sum T_s, and its error that of a ratio estimator,
        sqrt(n / (n - 1) sum (y_s - R T_s)^2) / sum T_s (Cochran, Sampling Techniques, section 2.11).
        """
        self._refuse_one()
        ratio = self._mean[0] / self._mean[1]
        direction = np.array([1.0, -ratio, 0.0])
        spread = max(0.0, direction @ self._moments @ direction)
        error = np.sqrt(self.number / (self.number - 1) * spread) / (self.number * self._mean[1])
        return float(self._origin + ratio), float(error)

    def by_sentences(self) -> tuple[float, float]:
        """Mean over sentences of the mean over positions, and its standard error."""
        self._refuse_one()
        return float(self._origin + self._mean[2]), float(np.sqrt(self._moments[2, 2] / (self.number - 1) / self.number))

    def _refuse_one(self) -> None:
        if self.number < 2:
            raise InputError(f"{self.number} sentence: a standard error needs at least 2; give a longer text")


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95% interval of a probability from the share of successes in `number` independent trials (Wilson 1927).

    >>> low, high = wilson(1.0, 1000)
    >>> round(low, 5), round(high, 5)
    (0.99617, 1.0)
    """
    z = special.ndtri(0.975)
    middle = share + z * z / (2 * number)
    half = z * np.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return float((middle - half) / (1 + z * z / number)), float((middle + half) / (1 + z * z / number))
