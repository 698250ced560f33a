"""The verdicts of comparisons, as pure functions of changes, margins and expectations.

A quantity (flatness, or the accuracy on a task with some number of labels) gets the first of these that applies:

    not at the same loss            by `pretraining.report.same_loss`
    no headroom                     accuracies only; by `headroom`
    holds, does not hold            the 95% interval lies off 0, on the expected side or on the other one; rises or falls where
                                    no side is expected; "smaller than the margin" if the interval lies inside it
    no effect beyond X              the interval contains 0 and lies inside +-margin; X is its larger end
    undecided                       else, with the number of seeds that would decide it

The p-value of a verdict belongs to the hypothesis that it rejects: no difference, or for "no effect" a difference outside the
margin. At most one of the two is true, so one test per quantity counts in the family. A verdict survives if Holm's adjusted
p-value is at most 0.05.
"""

import dataclasses
import math
from collections.abc import Sequence

from pcfg.common.schema import Schema
from pretraining.experiments.study import Direction
from pretraining.report.intervals import Change, holm, mean_of, required_seeds
from pretraining.report.same_loss import LEVEL

NOT_MEASURED = "not measured"
NOT_SAME_LOSS = "not at the same loss"
NO_HEADROOM = "no headroom"
HOLDS = "holds"
HOLDS_NOT = "does not hold"
NO_EFFECT = "no effect"
UNDECIDED = "undecided"
REFUSALS = (NOT_MEASURED, NOT_SAME_LOSS, NO_HEADROOM)
HEADROOM_ERRORS = 2  # standard errors between the models and the controls, and between the models and 100%


class Verdict(Schema):
    """What is said of one quantity of one comparison."""

    word: str
    reason: str = ""  # of a refusal
    is_small: bool = False  # the interval lies off 0 and inside the margin
    reach: float | None = None  # of "no effect": the larger end of the interval
    seeds: int | None = None  # of "undecided": the number that would decide it
    p_value: float | None = None
    adjusted: float | None = None  # p-value, within the family of the primary comparisons
    survives: bool | None = None

    def text(self, scale: float = 1.0, unit: str = "", digits: int = 1) -> str:
        """The verdict in words.

        >>> Verdict(word=NO_EFFECT, reach=0.0131).text(100, " points"), Verdict(word=UNDECIDED, seeds=14).text()
        ('no effect beyond 1.3 points', 'undecided (about 14 seeds would decide)')
        """
        if self.word == NO_EFFECT:
            return f"{NO_EFFECT} beyond {(self.reach or 0.0) * scale:.{digits}f}{unit}"
        if self.word == UNDECIDED:
            return f"{UNDECIDED} ({self.reason or f'about {self.seeds} seeds would decide'})"
        if self.word in REFUSALS:
            return f"{self.word}: {self.reason}" if self.reason else self.word
        return f"{self.word} (smaller than the margin)" if self.is_small else self.word


def decide(change: Change | None, margin: float, expected: Direction | None = None, refusal: Verdict | None = None) -> Verdict:
    """The verdict on one quantity.

    Args:
        change: of the quantity; None where it was not measured on both sides.
        margin: in the unit of the change.
        refusal: why there can be no verdict; it goes first.
    """
    if refusal is not None:
        return refusal
    if change is None:
        return Verdict(word=NOT_MEASURED)
    reach = change.reach()
    if reach is None:
        return Verdict(word=UNDECIDED, reason="no spread over seeds" if max(change.n) > 1 else "one seed has no interval")
    if sign := change.sign():
        direction: Direction = "rises" if sign > 0 else "falls"
        word = direction if expected is None else HOLDS if direction == expected else HOLDS_NOT
        return Verdict(word=word, is_small=reach <= margin, p_value=change.p_value())
    if reach <= margin:
        return Verdict(word=NO_EFFECT, reach=reach, p_value=change.equivalence_p(margin))
    seeds = required_seeds(change, margin)
    reason = "" if seeds else "more than a thousand seeds would be required" if change.deviations else "the spread is not known"
    return Verdict(word=UNDECIDED, seeds=seeds, reason=reason, p_value=change.p_value())


def combine(flatness: Verdict, accuracy: Verdict) -> str:
    """The verdict on a claim about both: it holds if both sides do, and does not if one of them does not.

    >>> combine(Verdict(word=HOLDS), Verdict(word=NO_EFFECT)), combine(Verdict(word=HOLDS), Verdict(word=NO_HEADROOM))
    ('does not hold', 'no headroom')
    """
    words = (flatness.word, accuracy.word)
    if refusals := [refusal for refusal in REFUSALS if refusal in words]:
        return refusals[0]
    if HOLDS_NOT in words or NO_EFFECT in words:
        return HOLDS_NOT
    return HOLDS if words == (HOLDS, HOLDS) else UNDECIDED


def adjust(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts of one family with Holm's adjusted p-values; those without a p-value are no part of the family."""
    tested = [index for index, verdict in enumerate(verdicts) if verdict.p_value is not None]
    adjusted = holm([verdicts[index].p_value or 0.0 for index in tested])
    result = list(verdicts)
    for index, p_value in zip(tested, adjusted, strict=True):
        survives = None if verdicts[index].word == UNDECIDED else p_value <= 1 - LEVEL
        result[index] = verdicts[index].model_copy(update={"adjusted": p_value, "survives": survives})
    return result


@dataclasses.dataclass(frozen=True)
class Headroom:
    """Whether a task with some number of labels measures what pre-training adds."""

    exists: bool | None  # None where it is not known
    reason: str  # the figures, or what is missing


def headroom(models: Sequence[float], words: float | None, untrained: Sequence[float]) -> Headroom:
    """Whether the base models' accuracy lies above both controls, and below 100%, by 2 standard errors each.

    Args:
        models: accuracies of the base group's models of the selection seeds (fractions).
        words: of a probe of one-hot words.
        untrained: of untrained models.
    """
    missing = [name for name, values in (("words", words), ("untrained", untrained or None)) if values is None]
    if missing or len(models) < 2:
        return Headroom(None, f"{' and '.join(missing)} not measured" if missing else "it takes two selection seeds")
    mean = mean_of(models)
    by_chance = mean_of(untrained)
    controls = [(words or 0.0, 0.0, "words"), (by_chance.value, by_chance.error or 0.0, "an untrained model")]
    floor, floor_error, name = max(controls)
    error = mean.error or 0.0
    figures = f"base models {100 * mean.value:.1f} ± {100 * error:.1f}%, {name} {100 * floor:.1f}%"
    is_above = mean.value - floor > HEADROOM_ERRORS * math.hypot(error, floor_error)
    return Headroom(is_above and mean.value + HEADROOM_ERRORS * error < 1, figures)
