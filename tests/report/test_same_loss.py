"""The criterion of the same loss against scipy's intervals, and the bounds of differences against paired data."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pretraining.report.same_loss import SameLoss, gap_change

COLUMNS = ["gap", "gap_se", "gap_difference", "gap_difference_se", "paired"]


def models(*rows):
    return pd.DataFrame(rows, columns=COLUMNS, index=[f"model {i}" for i in range(len(rows))])


def test_criteria():
    criterion = SameLoss(max_gap=0.02, margin=0.02)
    assert criterion.is_saturated(0.016, 0.002) and not criterion.is_saturated(0.0161, 0.002)
    assert criterion.is_equal(-0.01, 0.005) and not criterion.is_equal(-0.01, 0.0052)
    assert "at most 0.02 nats" in criterion.statement() and "±0.02 nats" in criterion.statement()


def test_defaults_are_those_of_the_project():
    assert SameLoss() == SameLoss(max_gap=0.02, margin=0.01)


@pytest.mark.parametrize("gap", [0.01, 0.017, 0.0185])
@pytest.mark.parametrize("difference", [0.0, -0.006, 0.0095])
def test_intervals_are_scipys(gap, difference):
    saturated = stats.norm(gap, 0.001).ppf(0.975) <= 0.02
    low, high = stats.norm(difference, 0.001).interval(0.95)
    columns = SameLoss().judge(models((gap, 0.001, difference, 0.001, True), (0.01, 0.001, 0.0, 0.0, True)), "model 1")
    equal = -0.01 <= low and high <= 0.01
    assert columns.iloc[0].tolist() == [saturated, equal, saturated and equal]


def test_what_is_not_known_is_neither_true_nor_false():
    rows = models(
        (0.01, 0.001, 0.0, 0.0, True),
        (np.nan, np.nan, np.nan, np.nan, False),
        (0.03, 0.001, np.nan, np.nan, False),
        (0.01, 0.001, 0.009, 0.002, False),  # a bound that is too wide does not prove a difference
        (0.01, 0.001, 0.009, 0.002, True),
    )
    columns = SameLoss().judge(rows, "model 0")
    assert columns["saturated"].isna().tolist() == [False, True, False, False, False]
    assert columns["equal"].isna().tolist() == [False, True, True, True, False]
    assert columns["same_loss"].isna().tolist() == [False, True, False, True, False]  # unsaturated and unknown is no
    assert columns["same_loss"].fillna(True).tolist() == [True, True, False, True, False]


def test_nothing_has_the_loss_of_a_reference_that_is_not_saturated():
    rows = models((0.015, 0.001, -0.007, 0.001, True), (0.022, 0.001, 0.0, 0.0, True))
    assert SameLoss().judge(rows, "model 1")["same_loss"].tolist() == [False, False]
    assert SameLoss(max_gap=0.03).judge(rows, "model 1")["same_loss"].tolist() == [True, True]
    assert SameLoss().judge(rows, None)["same_loss"].isna().tolist() == [True, False]


def test_the_bound_of_a_difference_is_never_below_its_paired_error():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.1, 500)
    losses = [0.01 + common + rng.normal(0, 0.02, 500) for _ in range(3)]  # of two models and the reference, by sentences
    rows = []
    for loss in losses:
        rows.append((loss.mean(), stats.sem(loss), (loss - losses[2]).mean(), stats.sem(loss - losses[2]), True))
    rows = models(*rows)
    value, error = gap_change(rows.iloc[0], rows.iloc[1])
    paired = losses[1] - losses[0]
    assert value == pytest.approx(paired.mean()) and stats.sem(paired) <= error < 2 * stats.sem(paired)
    without_reference = rows.assign(gap_difference=np.nan)
    value, error = gap_change(without_reference.iloc[0], without_reference.iloc[1])
    assert (value, error) == pytest.approx((paired.mean(), stats.sem(losses[0]) + stats.sem(losses[1])))
    assert gap_change(rows.iloc[0], without_reference.assign(gap=np.nan).iloc[1]) is None


def test_obstacles():
    both = models((0.005, 0.0002, 0.0, 0.0, True), (0.0146, 0.0003, 0.0096, 0.0004, True))
    first, second = both.iloc[0], both.iloc[1]
    assert SameLoss().obstacle(first, second) == "not the same loss, mean gaps differ by +0.0096 ± 0.0004 nats, margin ±0.01"
    assert SameLoss(margin=0.02).obstacle(first, second) is None
    unknown = both.assign(gap=np.nan, gap_difference=np.nan).iloc[1]
    assert SameLoss().obstacle(first, unknown) == "their difference of gaps is not known"
