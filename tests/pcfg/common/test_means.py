import numpy as np
import pytest

from pcfg.common.files import InputError
from pcfg.common.means import SentenceMeans


def test_means_and_their_errors():
    rng = np.random.default_rng(3)
    estimates = {SentenceMeans.by_pairs: [], SentenceMeans.by_sentences: []}
    errors = {SentenceMeans.by_pairs: [], SentenceMeans.by_sentences: []}
    for _ in range(400):
        lengths = rng.integers(1, 6, size=200)
        # values of a sentence depend on each other and on its length, so positions are no independent sample
        values = np.repeat(rng.normal(size=200) + lengths, lengths) + rng.normal(size=lengths.sum())
        for function in estimates:
            mean, error = function(SentenceMeans().add(values, lengths))
            estimates[function].append(mean)
            errors[function].append(error)
    assert np.mean(estimates[SentenceMeans.by_pairs]) == pytest.approx(55 / 15, abs=0.02)
    assert np.mean(estimates[SentenceMeans.by_sentences]) == pytest.approx(3, abs=0.02)
    for function in estimates:
        assert np.mean(errors[function]) == pytest.approx(np.std(estimates[function]), rel=0.12)
    with pytest.raises(InputError, match="at least 2"):
        SentenceMeans().add(np.ones(3), np.array([3])).by_pairs()


def naive_means(values, lengths):
    """The formulas of the docstrings, one sentence at a time."""
    sums = [part.sum() for part in np.split(values, np.cumsum(lengths)[:-1])]
    ratio = sum(sums) / sum(lengths)
    squares = sum((y - ratio * length) ** 2 for y, length in zip(sums, lengths, strict=True))
    n, means = len(lengths), [y / length for y, length in zip(sums, lengths, strict=True)]
    return (ratio, np.sqrt(n / (n - 1) * squares) / sum(lengths)), (np.mean(means), np.std(means, ddof=1) / np.sqrt(n))


@pytest.mark.parametrize("offset", [0.0, 4.5, 1e6])
def test_blocks_merge_into_the_whole(offset):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, size=500)
    values = offset + rng.normal(size=lengths.sum()) * 1e-2
    expected = naive_means(values, lengths)
    for size in (1, 7, 499, 500):
        means, row = SentenceMeans(), 0
        for first in range(0, 500, size):
            block = lengths[first : first + size]
            means.add(values[row : row + block.sum()], block)
            row += block.sum()
        assert means.number == 500
        np.testing.assert_allclose(means.by_pairs(), expected[0], rtol=1e-6)
        np.testing.assert_allclose(means.by_sentences(), expected[1], rtol=1e-6)
