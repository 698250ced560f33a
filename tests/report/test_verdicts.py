"""Each branch of the verdicts over made-up changes, their order, the family of Holm's correction, and headroom."""

import numpy as np
import pytest

from pretraining.report import verdicts
from pretraining.report.intervals import Change, paired_change
from pretraining.report.verdicts import Verdict, adjust, combine, decide, headroom

MARGIN = 1.0


def change(low, high, n=8) -> Change:
    """A paired change with this interval (t with n - 1 degrees of freedom)."""
    ends = np.linspace(-1, 1, n)
    unit = paired_change(np.zeros(n), ends)
    half = (high - low) / 2
    found = paired_change(np.zeros(n), (low + high) / 2 + ends * half / unit.high)
    assert (found.low, found.high) == pytest.approx((low, high))
    return found


@pytest.mark.parametrize(
    "low, high, expected, text",
    [
        (0.5, 2.0, "rises", "holds"),
        (0.5, 2.0, "falls", "does not hold"),
        (0.5, 2.0, None, "rises"),
        (-2.0, -0.5, None, "falls"),
        (-2.0, -0.5, "falls", "holds"),
        (0.1, 0.9, "rises", "holds (smaller than the margin)"),
        (0.1, 0.9, "falls", "does not hold (smaller than the margin)"),
        (-0.9, -0.1, None, "falls (smaller than the margin)"),
        (-0.3, 0.8, "rises", "no effect beyond 0.8"),
        (-0.8, 0.3, None, "no effect beyond 0.8"),
        (-0.3, 1.2, "rises", "undecided (about 13 seeds would decide)"),
        (-3.0, 2.0, None, "undecided (about 140 seeds would decide)"),
    ],
)
def test_intervals_decide(low, high, expected, text):
    verdict = decide(change(low, high), MARGIN, expected)
    assert verdict.text() == text
    assert (verdict.p_value <= 0.05) == (verdict.word != "undecided")


def test_the_order_of_verdicts():
    clear = change(2, 3)
    for word in (verdicts.NOT_SAME_LOSS, verdicts.NO_HEADROOM):
        verdict = decide(clear, MARGIN, "rises", Verdict(word=word, reason="because"))
        assert verdict.text() == f"{word}: because" and verdict.p_value is None
    assert decide(None, MARGIN, "rises").word == "not measured"
    assert decide(None, MARGIN, None, Verdict(word=verdicts.NO_HEADROOM)).word == verdicts.NO_HEADROOM
    assert decide(paired_change([1.0], [2.0]), MARGIN).text() == "undecided (one seed has no interval)"
    assert decide(paired_change([1.0, 2.0], [2.0, 3.0]), MARGIN).text() == "undecided (no spread over seeds)"
    edge = paired_change([0.0, 0.0], [-5.0, 5.5])
    assert "about" in decide(edge, MARGIN).text()
    far = paired_change([0.0, 0.0], [-500.0, 500.1])
    assert decide(far, MARGIN).text() == "undecided (more than a thousand seeds would be required)"


def test_a_claim_needs_both_sides():
    words = ("holds", "does not hold", "no effect", "undecided", "no headroom", "not at the same loss")
    table = {(first, second): combine(Verdict(word=first), Verdict(word=second)) for first in words[:4] for second in words}
    assert [pair for pair, word in table.items() if word == "holds"] == [("holds", "holds")]
    undecided = {pair for pair, word in table.items() if word == "undecided"}
    assert undecided == {("holds", "undecided"), ("undecided", "holds"), ("undecided", "undecided")}
    assert {pair[1] for pair, word in table.items() if word == "no headroom"} == {"no headroom"}
    assert {pair[1] for pair, word in table.items() if word == "not at the same loss"} == {"not at the same loss"}
    assert combine(Verdict(word="not at the same loss"), Verdict(word="no headroom")) == "not at the same loss"


def test_the_family_has_one_test_per_verdict():
    family = [
        decide(change(0.2, 2.0), MARGIN, "rises"),
        decide(change(-0.98, 0.95), MARGIN, "rises"),
        decide(change(-2.0, 3.0), MARGIN),
        Verdict(word=verdicts.NO_HEADROOM, reason="because"),
    ]
    first, second, third, refusal = adjust(family)
    raw = [verdict.p_value for verdict in family[:3]]
    assert raw[0] < raw[1] < 0.05 < raw[2]
    assert [verdict.adjusted for verdict in (first, second, third)] == pytest.approx(
        [3 * raw[0], max(3 * raw[0], 2 * raw[1]), raw[2]]
    )
    assert first.survives is False and third.survives is None  # an open verdict has nothing to lose
    assert refusal == family[3] and refusal.adjusted is None
    [alone] = adjust(family[:1])
    assert alone.survives is True and alone.word == "holds"


@pytest.mark.parametrize(
    "models, words, untrained, exists",
    [
        ((0.912, 0.914, 0.911), 0.80, (0.804, 0.805, 0.803), True),
        ((0.912, 0.914, 0.911), 0.911, (0.804, 0.805, 0.803), False),  # words are as good
        ((0.912, 0.914, 0.911), 0.80, (0.911, 0.913, 0.912), False),  # untrained models are
        ((0.9980, 0.9999, 0.9998), 0.80, (0.80, 0.80, 0.80), False),  # 100% is within two standard errors
        ((0.80, 0.90, 1.00), 0.79, (0.70, 0.70, 0.70), False),  # not by two standard errors
        ((0.912,), 0.80, (0.80,), None),
        ((0.912, 0.914), None, (0.80,), None),
        ((0.912, 0.914), 0.80, (), None),
    ],
)
def test_headroom(models, words, untrained, exists):
    assert headroom(models, words, untrained).exists is exists


@pytest.mark.parametrize("words, models", [(0.979, 0.978), (0.987, 0.985), (0.998, 0.998)])
def test_the_former_mini_language_has_no_headroom(words, models):
    """Accuracies on A, B and C of rule_mini_mlm.txt, of a probe of the words and of trained models; 94% untrained."""
    state = headroom((models - 0.001, models, models + 0.001), words, (0.94, 0.941, 0.939))
    refusal = Verdict(word=verdicts.NO_HEADROOM, reason=state.reason)
    assert state.exists is False
    verdict = decide(change(0.01, 0.03), 0.015, "rises", refusal)
    assert verdict.word == "no headroom" and f"words {100 * words:.1f}%" in verdict.text()
