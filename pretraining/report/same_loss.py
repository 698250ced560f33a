"""The criterion of "the same loss", the only one of the project: report, plots, experiments and choices all use it.

With g the gap to the entropy and d a paired difference of two gaps (both means over sentences, in nats), s the standard error
of either over sentences, and z = 1.96:

    saturated    g + z s <= max_gap      for each of the models
    equal        |d| + z s <= margin     for the two models, or for the mean gaps of two groups

Two models have the same loss if both are saturated and they are equal. Two groups of seeds have it if the 95% interval of the
mean difference over seeds lies inside +-margin as well. Natural text has no exact entropy, so saturation is not known there:
groups of models are compared by their MLM losses on held-out samples alone, single models not at all.

Few pairs of models are compared directly. The difference of any two follows from their differences to a common reference, or
from their gaps: the values subtract, and since sd(X - Y) <= sd(X) + sd(Y), the sum of the standard errors bounds the standard
error of the paired difference. With such a bound two losses can be found equal, never different.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
Z = float(stats.norm.ppf((1 + LEVEL) / 2))
MAX_GAP = 0.02  # nats
MARGIN = 0.01  # nats
Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SameLoss:
    """The criterion with its thresholds, in nats.

    >>> criterion = SameLoss(max_gap=0.02, margin=0.01)
    >>> criterion.is_saturated(0.015, 0.002), criterion.is_saturated(0.015, 0.003)
    (True, False)
    >>> criterion.is_equal(-0.005, 0.002), criterion.is_equal(-0.005, 0.003)
    (True, False)
    """

    max_gap: float = MAX_GAP
    margin: float = MARGIN

    def is_saturated(self, gap: float, error: float) -> bool:
        """Whether the 95% interval of a gap lies at or below `max_gap`."""
        return gap + Z * error <= self.max_gap

    def is_equal(self, difference: float, error: float) -> bool:
        """Whether the 95% interval of a difference of two losses lies inside +-`margin`."""
        return abs(difference) + Z * error <= self.margin

    def statement(self, has_gaps: bool = True) -> str:
        """The criterion in words; without gaps no entropy is known."""
        if not has_gaps:
            return (
                "No entropy is known. Two groups of models have the same loss if the 95% interval of the paired mean "
                f"difference of their MLM losses lies inside ±{self.margin:g} nats, both over seeds and over sentences."
            )
        return (
            f"Two models have the same loss if (a) the gap of each plus {Z:.2f} standard errors over sentences is at most "
            f"{self.max_gap:g} nats (saturated), and (b) the 95% interval of the paired mean difference of their gaps lies "
            f"inside ±{self.margin:g} nats (equal), for groups of models both over seeds and over sentences."
        )

    def obstacle_of_groups(
        self, gaps: dict[str, Pair] | None, over_seeds: Pair | None, over_sentences: Pair | None
    ) -> str | None:
        """Why two groups of models do not have the same loss; None if they have.

        Args:
            gaps: gap and standard error by model; None for natural text.
            over_seeds: 95% interval of the mean difference of the losses; None where there is none.
            over_sentences: the mean difference and (a bound of) its standard error; None where no error is known.
        """
        if unsaturated := {name: pair for name, pair in (gaps or {}).items() if not self.is_saturated(*pair)}:
            name, (gap, error) = max(unsaturated.items(), key=lambda item: item[1])
            others = f" (and {len(unsaturated) - 1} more)" if len(unsaturated) > 1 else ""
            return f"{name} is not saturated, gap {gap:.4f} ± {error:.4f} nats{others}"
        if over_seeds is None:
            return "the difference of the losses has no interval over seeds"
        if max(map(abs, over_seeds)) > self.margin:
            low, high = over_seeds
            return f"the difference of the losses is in [{low:+.4f}, {high:+.4f}] nats over seeds, margin ±{self.margin:g}"
        if over_sentences is not None and not self.is_equal(*over_sentences):
            value, error = over_sentences
            return f"the difference of the losses is {value:+.4f} ± {error:.4f} nats over sentences, margin ±{self.margin:g}"
        return None

    def judge(self, losses: pd.DataFrame, reference: str | None) -> pd.DataFrame:
        """Columns `saturated`, `equal` and `same_loss` of models, as nullable booleans: missing where that is not known.

        Args:
            losses: one row per model with columns `gap`, `gap_se`, `gap_difference`, `gap_difference_se` (to the reference) and
                `paired`, whether the difference was measured as one: its error is no bound then, and losses can be different.
            reference: label of the model that the others are compared with.
        """
        saturated = pd.array([self.is_saturated(*pair) for pair in losses[["gap", "gap_se"]].to_numpy()], "boolean")
        saturated[losses["gap"].isna().to_numpy()] = pd.NA
        pairs = losses[["gap_difference", "gap_difference_se"]].to_numpy()
        equal = pd.array([self.is_equal(*pair) for pair in pairs], "boolean")
        equal[np.asarray(~equal & ~losses["paired"].to_numpy(bool) | losses["gap_difference"].isna().to_numpy(), bool)] = pd.NA
        columns = pd.DataFrame({"saturated": saturated, "equal": equal}, index=losses.index)
        of_reference = columns["saturated"].get(reference, pd.NA)
        # Three-valued logic: False and unknown is False.
        same_loss = columns["saturated"] & columns["equal"] & of_reference
        return columns.assign(same_loss=same_loss.mask(losses["gap"].isna()))

    def obstacle(self, before: pd.Series, after: pd.Series) -> str | None:
        """Why two models are not known to be equal; None if they are. Each is a row of `judge`, with the same reference."""
        difference = gap_change(before, after)
        if difference is None:
            return "their difference of gaps is not known"
        value, error = difference
        if self.is_equal(value, error):
            return None
        return f"not the same loss, mean gaps differ by {value:+.4f} ± {error:.4f} nats, margin ±{self.margin:g}"


def gap_change(before: pd.Series, after: pd.Series) -> tuple[float, float] | None:
    """Gap of `after` minus that of `before`, and a bound of its standard error over sentences; None if not known.

    It is the way with the smaller bound: by the differences to the reference, or by the gaps.
    """
    ways = [(before[f"{name}_se"] + after[f"{name}_se"], after[name] - before[name]) for name in ("gap_difference", "gap")]
    known = [way for way in ways if not np.isnan(way[1])]
    if not known:
        return None
    error, value = min(known)
    return float(value), float(error)
