"""The report's statistics against scipy's, and the bootstrap against one draw at a time."""

import numpy as np
import pytest
from scipy import stats

from pretraining.report import intervals
from pretraining.report.intervals import Mean, change_of_means, correlate, mean_of, paired_change

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (8, 2)])
def test_welch_is_scipys(sizes):
    a, b = RNG.normal(1, 2, sizes[0]), RNG.normal(0, 0.3, sizes[1])
    change, theirs = change_of_means(mean_of(a), mean_of(b)), stats.ttest_ind(b, a, equal_var=False)
    assert (change.low, change.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert change.degrees == pytest.approx(theirs.df) and change.value == pytest.approx(b.mean() - a.mean())
    assert (change.sign() != 0) == (theirs.pvalue < 0.05)


def test_paired_interval_is_scipys():
    a, b = RNG.normal(0, 1, 4), RNG.normal(3, 1, 4)
    change, theirs = paired_change(a, b), stats.ttest_rel(b, a)
    assert (change.low, change.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_no_interval_without_spread_or_with_one_value():
    assert paired_change([1.0], [2.0]).low is None and paired_change([1.0, 2.0], [2.0, 3.0]).sign() == 0
    assert paired_change([0.7, 0.6], [0.75, 0.65]).low is None  # 0.05 but for rounding
    assert change_of_means(mean_of([1.0]), mean_of([2.0, 3.0])).sign() == 0
    # a constant against a mean: the mean's own interval
    change = change_of_means(Mean(0.0, 0.0, 1, 1), mean_of([2.0, 3.0, 4.0]))
    theirs = stats.ttest_1samp([2.0, 3.0, 4.0], 0).confidence_interval()
    assert (change.low, change.high) == pytest.approx(tuple(theirs))
    normal = change_of_means(Mean(0.0, 1.0, np.inf, 1), Mean(1.0, 1.0, np.inf, 1))
    assert normal.high == pytest.approx(1 + stats.norm.ppf(0.975) * 2**0.5)


def naive_bootstrap(x, y, runs, draws, purpose):
    """Each draw as a sample of its own, through scipy."""
    labels = list(dict.fromkeys(runs))
    rng = intervals.keyed_rng(intervals.SEED, f"bootstrap, {purpose}")
    found = []
    for counts in rng.multinomial(len(labels), [1 / len(labels)] * len(labels), size=draws):
        chosen = [
            i for label, times in zip(labels, counts, strict=True) for _ in range(times) for i in np.flatnonzero(runs == label)
        ]
        a, b = x[chosen], y[chosen]
        if len(set(a)) > 1 and len(set(b)) > 1:
            found.append((stats.spearmanr(a, b)[0], stats.pearsonr(a, b)[0]))
    return np.array(found)


def test_correlations_are_scipys_draw_by_draw():
    runs = np.array(["a", "a", "b", "c", "c", "c", "d"])
    x = np.array([1.0, 2.0, 2.0, 5.0, 3.0, 3.0, 2.0])  # ties
    y = np.array([9.0, 7.0, 7.5, 1.0, 2.0, 4.0, 7.5])
    found = correlate(x, y, runs, "test", draws=300)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0]) and found.pearson == pytest.approx(stats.pearsonr(x, y)[0])
    naive = naive_bootstrap(x, y, runs, 300, "test")
    assert found.undefined_draws == pytest.approx(1 - len(naive) / 300) and found.undefined_draws > 0
    for column, interval in enumerate((found.spearman_interval, found.pearson_interval)):
        assert interval == pytest.approx(np.quantile(naive[:, column], (0.025, 0.975)), abs=1e-12)
    assert (found.n, found.runs) == (7, 4)
    assert correlate(x, y, runs, "test", draws=300) == found != correlate(x, y, runs, "other", draws=300)


def test_correlations_that_can_not_be_told():
    assert correlate([1, 2, 3], [1, 2, 3], ["a", "b", "c"], "few").spearman is None
    assert correlate([1, 1, 1, 1], [1, 2, 3, 4], list("abcd"), "flat").pearson is None
    assert correlate([], [], [], "none").n == 0
    one = correlate([1, 2, 3, 4], [1, 3, 2, 5], ["a"] * 4, "one run")
    assert one.spearman == pytest.approx(0.8) and one.spearman_interval is None
