"""Means over positions and over sentences, with standard errors whose independent units are the sentences."""

import numpy as np

from pcfg.common.files import InputError


class SentenceMeans:
    """Means over positions or sentences, and their standard errors, from sentences that come block by block.

    With y_s the sum of the values over sentence s and T_s its length (y_s is T_s times the mean of its values where there are
    values at some positions only, chosen by chance: the mean over sentences stays without bias, that over pairs, a ratio, has
    one of the order of 1 / sentences), kept are the means of (y, T, y / T) over the sentences
    and the matrix of their centred second moments, into which those of two blocks merge (Chan, Golub and LeVeque 1983). From
    the values, the first block's mean is subtracted, lest sums that go with the length hide the differences between values.

    >>> means = SentenceMeans()
    >>> means.add(np.array([1.0, 1.0, 4.0]), np.array([2, 1]))
    >>> means.by_pairs()[0], means.by_sentences()[0]
    (2.0, 2.5)
    """

    def __init__(self):
        self.number, self._mean, self._moments = 0, np.zeros(3), np.zeros((3, 3))
        self._origin = 0.0

    def add(self, values, counts, lengths=None) -> None:
        """Take in sentences.

        Args:
            values: (sum of counts,), a sentence's positions one after the other.
            counts: (n,) how many values each has, 1 or more.
            lengths: (n,) how many positions each has; None for `counts`.
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
        mean, number = facts.mean(axis=0), len(lengths)
        facts -= mean
        shift, total = mean - self._mean, self.number + number
        self._moments += facts.T @ facts + np.outer(shift, shift) * (self.number * number / total)
        self._mean += shift * (number / total)
        self.number = total

    def by_pairs(self) -> tuple[float, float]:
        """Mean over all (sentence, position) pairs, and its standard error with sentences as clusters.

        The mean is R = sum y_s / sum T_s, and its error that of a ratio estimator,
        sqrt(n / (n - 1) sum (y_s - R T_s)^2) / sum T_s (Cochran, Sampling Techniques, section 2.11).

        Raises:
            InputError: there are fewer than two sentences.
        """
        self._refuse_one()
        ratio = self._mean[0] / self._mean[1]
        direction = np.array([1.0, -ratio, 0.0])
        spread = max(0.0, direction @ self._moments @ direction)
        error = np.sqrt(self.number / (self.number - 1) * spread) / (self.number * self._mean[1])
        return float(self._origin + ratio), float(error)

    def by_sentences(self) -> tuple[float, float]:
        """Mean over sentences of the mean over positions, and its standard error; raises as `by_pairs`."""
        self._refuse_one()
        return float(self._origin + self._mean[2]), float(np.sqrt(self._moments[2, 2] / (self.number - 1) / self.number))

    def _refuse_one(self) -> None:
        if self.number < 2:
            raise InputError(f"{self.number} sentence: a standard error takes at least 2; give a longer text")


def mean_by_pairs(values, counts, lengths=None) -> tuple[float, float]:
    """`SentenceMeans.by_pairs` of values that are all there; arguments as in `SentenceMeans.add`."""
    means = SentenceMeans()
    means.add(values, counts, lengths)
    return means.by_pairs()


def mean_by_sentences(values, counts, lengths=None) -> tuple[float, float]:
    """`SentenceMeans.by_sentences` of values that are all there; arguments as in `SentenceMeans.add`."""
    means = SentenceMeans()
    means.add(values, counts, lengths)
    return means.by_sentences()
