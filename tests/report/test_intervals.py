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
            found.append(stats.spearmanr(a, b)[0])
    return np.array(found)


def test_correlations_are_scipys_draw_by_draw():
    runs = np.array(["a", "a", "b", "c", "c", "c", "d"])
    x = np.array([1.0, 2.0, 2.0, 5.0, 3.0, 3.0, 2.0])  # ties
    y = np.array([9.0, 7.0, 7.5, 1.0, 2.0, 4.0, 7.5])
    found = correlate(x, y, runs, "test", draws=300)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    naive = naive_bootstrap(x, y, runs, 300, "test")
    assert len(naive) < 300  # some draws have no spread
    assert found.spearman_interval == pytest.approx(np.quantile(naive, (0.025, 0.975)), abs=1e-12)
    assert (found.n, found.runs) == (7, 4)
    assert correlate(x, y, runs, "test", draws=300) == found
    assert correlate(x, y, runs, "test", draws=9) != correlate(x, y, runs, "other", draws=9)


def test_correlations_that_can_not_be_told():
    assert correlate([1, 2, 3], [1, 2, 3], ["a", "b", "c"], "few").spearman is None
    assert correlate([1, 1, 1, 1], [1, 2, 3, 4], list("abcd"), "flat").spearman is None
    assert correlate([], [], [], "none").n == 0
    one = correlate([1, 2, 3, 4], [1, 3, 2, 5], ["a"] * 4, "one run")
    assert one.spearman == pytest.approx(0.8) and one.spearman_interval is None


def naive_holm(p_values):
    """Each hypothesis against the step-down rule: the largest of (m - k + 1) p_(k) over the k smaller or equal ones."""
    ordered = sorted(p_values)
    m = len(ordered)
    return [min(1.0, max((m - k) * ordered[k] for k in range(ordered.index(p) + 1))) for p in p_values]


def test_holm():
    assert intervals.holm([]) == []
    for _ in range(50):
        p_values = RNG.uniform(0, 1, RNG.integers(1, 9)) ** 3
        assert intervals.holm(p_values.tolist()) == pytest.approx(naive_holm(p_values.tolist()))
    assert intervals.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])  # a textbook's


@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0])
def test_p_values_are_scipys(shift):
    a, b = RNG.normal(0, 1, 7), RNG.normal(shift, 1, 7)
    assert paired_change(a, b).p_value() == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert change_of_means(mean_of(a), mean_of(b)).p_value() == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    one = intervals.change_to_number(a, shift)
    theirs = stats.ttest_1samp(a, shift)
    assert one.p_value() == pytest.approx(theirs.pvalue) and one.value == pytest.approx(shift - a.mean())
    assert (shift - one.high, shift - one.low) == pytest.approx(tuple(theirs.confidence_interval()))


@pytest.mark.parametrize("margin", [0.2, 0.6, 1.0, 3.0])
def test_equivalence_is_two_one_sided_tests(margin):
    for _ in range(20):
        a = RNG.normal(0, 1, 6)
        change = paired_change(np.zeros(6), a)
        below = stats.ttest_1samp(a, -margin, alternative="greater").pvalue
        above = stats.ttest_1samp(a, margin, alternative="less").pvalue
        assert change.equivalence_p(margin) == pytest.approx(min(1.0, 2 * max(below, above)))
        assert (change.equivalence_p(margin) <= 0.05) == (max(abs(change.low), abs(change.high)) <= margin)


def is_decided(value, deviations, seeds, margin):
    """Whether an interval of made-up samples, with exactly this mean and these deviations, lies off 0 or in +-margin."""
    ends = np.linspace(-1, 1, seeds)
    shape = (ends - ends.mean()) / ends.std(ddof=1)
    if len(deviations) == 1:
        change = paired_change(np.zeros(seeds), value + shape * deviations[0])
    else:
        change = change_of_means(mean_of(shape * deviations[0]), mean_of(value + shape * deviations[1]))
    return change.sign() != 0 or max(abs(change.low), abs(change.high)) <= margin


@pytest.mark.parametrize("value, deviations", [(0.4, (1.0,)), (0.02, (0.3,)), (-0.5, (0.4, 2.0)), (0.1, (0.5, 0.5))])
def test_required_seeds_by_search(value, deviations):
    change = paired_change([0.0, 0.0, 0.0], [1.0, 2.0, 4.0]).model_copy(update={"value": value, "deviations": deviations})
    expected = next(seeds for seeds in range(2, 1000) if is_decided(value, deviations, seeds, 0.2))
    assert intervals.required_seeds(change, 0.2) == expected > 2
    hopeless = change.model_copy(update={"value": 0.2, "deviations": (100.0,)})
    assert intervals.required_seeds(hopeless, 0.2) is None
    assert intervals.required_seeds(change.model_copy(update={"deviations": ()}), 0.2) is None
