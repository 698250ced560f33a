"""The findings of Liu et al. (2023) as sentences computed from numbers: does each hold here, and by which changes?

| experiment | compared | holds if, by 95% intervals |
| --- | --- | --- |
| steps, a group | first saturated checkpoint with the last one of the run, paired over seeds | trace falls, accuracy rises |
| sizes | smallest with largest group at the same loss (Welch over seeds), by both rules | trace falls, accuracy rises |
| algorithms, a group | the first group with this one, at the same loss (Welch over seeds) | trace rises, accuracy falls |
| algorithms, lookup table | the first group with it, at the same loss | accuracy falls |

The rule was fixed beforehand, and is applied to each accuracy (task and kind) on its own; none is the headline's:

- holds: the intervals of the changes of both trace and accuracy lie on the paper's side of 0;
- does not hold: one of them lies on the other side;
- depends on the rule of enlarging: sizes whose verdicts with --tied-scale tables and head differ, both traces being there;
- can't be told: otherwise; also where a group is missing, not at the same loss, or of one seed.

At the same loss: saturated, and equal to the reference (see `pretraining.report.intervals`). In "steps" saturated is
enough: both checkpoints then have gaps below the same limit. The last checkpoint is the last one of the plan; a run without it,
or not saturated there or at no earlier one, is left out. In "sizes" and "algorithms" models that are not at the same loss are
left out, and "sizes" takes groups with two models at least. There is no correction for the number of comparisons.
"""

import dataclasses
import math

from pretraining.report.contract import ALGORITHMS, SIZES, STEPS, Experiment
from pretraining.report.experiment_rows import TRACE, accuracy_label, loss_label, trace_names
from pretraining.report.intervals import Change, Mean, change_of_means, mean_of, paired_change
from pretraining.report.rows import error_of

HOLDS, HOLDS_NOT, BY_RULE, OPEN = "holds", "does not hold", "depends on the rule of enlarging", "can't be told"
TITLES = {
    STEPS: "Training on after the loss has converged lowers the trace and raises the accuracy",
    SIZES: "A larger model at the same loss has a smaller trace and a higher accuracy",
    ALGORITHMS: "Another algorithm at the same loss has a larger trace and a lower accuracy",
}
TABLE_TITLE = "The lookup table, at the same loss, has a lower accuracy"
# The paper's sides of 0: of the trace's change, and of the accuracy's.
SIDES = {STEPS: (-1, 1), SIZES: (-1, 1), ALGORITHMS: (1, -1)}
FEWEST = 2  # models of a group, or pairs: an interval takes as many


@dataclasses.dataclass
class Finding:
    """One finding for one group.

    Attributes:
        experiment, title, subject: what is claimed, and of what.
        basis: what was compared, in words.
        changes: by column (traces, accuracies, `gap`) the change; None where a side is missing.
        verdicts: by accuracy one of `HOLDS`, `HOLDS_NOT`, `BY_RULE`, `OPEN`.
        by_trace: by accuracy and trace the verdict under that trace alone.
        reason: why nothing can be compared, else None.
        left_out: models that are not compared, and why.
    """

    experiment: str
    title: str
    subject: str
    basis: str = ""
    changes: dict[str, Change | None] = dataclasses.field(default_factory=dict)
    verdicts: dict[str, str] = dataclasses.field(default_factory=dict)
    by_trace: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    left_out: list[str] = dataclasses.field(default_factory=list)

    def sides(self) -> tuple[int, int]:
        return SIDES[self.experiment]

    def judge(self, traces: tuple[str, ...], names: list[str]) -> None:
        """Fill in `verdicts` and `by_trace` from `changes`; without traces (a lookup table's) accuracy decides alone."""
        trace_side, accuracy_side = self.sides()
        all_traces = all(self.changes[trace] is not None for trace in traces)
        for name in names:
            if self.changes[name] is None:
                self.verdicts[name], self.by_trace[name] = OPEN, dict.fromkeys(traces, OPEN)
                continue
            accuracy = self.changes[name].sign() * accuracy_side
            signs = {trace: _side(self.changes[trace]) * trace_side for trace in traces}
            self.by_trace[name] = {trace: _verdict(sign, accuracy) for trace, sign in signs.items()}
            found = set(self.by_trace[name].values()) or {_verdict(accuracy)}
            self.verdicts[name] = found.pop() if len(found) == 1 else BY_RULE if all_traces else OPEN

    def headline(self) -> str:
        """What holds for which accuracies, without numbers."""
        if self.reason:
            return f"{self.title} ({self.subject}): {OPEN}, {self.reason}"
        parts = []
        for verdict in (HOLDS, HOLDS_NOT, BY_RULE, OPEN):
            if names := [accuracy_label(name) for name, found in self.verdicts.items() if found == verdict]:
                parts.append(f"{verdict} for {_and(names)}")
        return f"{self.title} ({self.subject}): {'; '.join(parts)}"

    def numbers(self) -> list[str]:
        """The changes, as signed numbers with their intervals and how they stand to the paper's."""
        trace_side, accuracy_side = self.sides()
        texts = []
        for name, change in self.changes.items():
            if name == "gap":
                texts.append(describe_change("gap", change, " nats"))
            elif name.startswith(TRACE):
                texts.append(describe_change(loss_label(name), change, "", trace_side))
            else:
                texts.append(describe_change(accuracy_label(name), change, " points", accuracy_side))
        return texts

    def sentence(self) -> str:
        """The finding in words and numbers."""
        text = self.headline() + ("." if self.reason else f". {self.basis}: {'; '.join(self.numbers())}.")
        return text + (f" {self.omissions()}" if self.left_out else "")

    def omissions(self) -> str:
        """The models that are not compared, as a sentence; empty where all are."""
        return f"Left out: {'; '.join(self.left_out)}." if self.left_out else ""


def _side(change: Change | None) -> int:
    return 0 if change is None else change.sign()


def _verdict(*sides: int) -> str:
    """The verdict of changes on the paper's side (1), on the other one (-1), or on neither (0)."""
    return HOLDS_NOT if -1 in sides else OPEN if 0 in sides else HOLDS


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def decimals(error: float | None, most: int = 6) -> int:
    """Digits behind the point that show two digits of an error.

    >>> [decimals(error) for error in (12.3, 1.23, 0.0123, None)], decimals(0.0123, most=2)
    ([0, 1, 3, 3], 2)
    """
    return min(most, max(0, 1 - math.floor(math.log10(error)))) if error else min(most, 3)


def describe_change(label: str, change: Change | None, unit: str = "", side: int | None = None) -> str:
    """A change as text: `trace -12.3 [-15.0, -9.6], as in the paper`.

    Args:
        unit: of the text: " nats", or " points" for accuracies, which are fractions.
        side: the paper's side of 0; None where the paper says nothing.
    """
    if change is None:
        return f"no {label}"
    scale, most = (100.0, 2) if unit == " points" else (1.0, 6)
    digits = decimals(None if change.error is None else change.error * scale, most)
    text = f"{label} {change.value * scale:+.{digits}f}"
    if change.low is None:
        return f"{text}{unit} (no interval: no spread over seeds, or one only)"
    text += f" [{change.low * scale:+.{digits}f}, {change.high * scale:+.{digits}f}]{unit}"
    if side is None:
        return text
    return text + {0: ", not told from 0", side: ", as in the paper", -side: ", against the paper"}[change.sign()]


def _who(row: dict) -> str:
    return row["group"] if row["seed"] is None else f"{row['group']} seed {row['seed']}"


def _loss_of(row: dict) -> str:
    """Why a model does not count as at the same loss."""
    if row.get("gap") is None:
        return "not measured" if row.get("kind") else "missing"
    if not row["saturated"]:
        return f"not saturated, gap {row['gap']:.4f} ± {row.get('gap_se') or 0:.4f} nats"
    if row.get("equal") is None:
        return "not compared with the reference"
    difference = f"{row['gap_difference']:+.4f} ± {row.get('gap_difference_se') or 0:.4f} nats"
    return f"not equal to the reference within the margin, {difference}"


def _steps(experiment: Experiment, rows: list[dict], names: list[str]) -> list[Finding]:
    """One finding an optimizer."""
    found = []
    for group in experiment.groups():
        finding = Finding(STEPS, TITLES[STEPS], group)
        pairs, seeds = [], list(dict.fromkeys(row["seed"] for row in rows if row["group"] == group))
        for seed in seeds:
            run = sorted(
                (row for row in rows if (row["group"], row["seed"]) == (group, seed)), key=lambda row: row["step"] or 0
            )
            saturated = [row for row in run[:-1] if row.get("saturated")]
            if not run[-1].get("saturated"):
                finding.left_out.append(f"{_who(run[-1])} (last checkpoint {_loss_of(run[-1])})")
            elif not saturated:
                finding.left_out.append(f"{_who(run[-1])} (no earlier checkpoint is saturated)")
            else:
                pairs.append((saturated[0], run[-1]))
        if len(pairs) < FEWEST:
            finding.reason = f"{len(pairs)} of {len(seeds)} runs can be compared, an interval takes {FEWEST}"
            finding.verdicts = dict.fromkeys(names, OPEN)
        else:
            steps = [_steps_text([row["step"] for row in side]) for side in zip(*pairs, strict=True)]
            finding.basis = f"From the first saturated checkpoint ({steps[0]}) to the last ({steps[1]}), {len(pairs)} seeds"
            for name in (*trace_names(experiment), "gap", *names):
                both = [(a[name], b[name]) for a, b in pairs if a.get(name) is not None and b.get(name) is not None]
                finding.changes[name] = paired_change(*zip(*both, strict=True)) if both else None
            finding.judge(trace_names(experiment), names)
        found.append(finding)
    return found


def _steps_text(steps: list[int]) -> str:
    low, high = min(steps), max(steps)
    return f"step {low:,}" if low == high else f"steps {low:,} to {high:,}"


def _at_same_loss(rows: list[dict], finding: Finding) -> list[dict]:
    """The models at the same loss, each run at its last step; what is left out is told in `finding`."""
    last = {}
    for row in sorted(rows, key=lambda row: row["step"] or 0):
        last[row["group"], row["seed"]] = row
    kept = []
    for row in rows:
        if last[row["group"], row["seed"]] is row:
            if row.get("saturated") and row.get("equal"):
                kept.append(row)
            else:
                finding.left_out.append(f"{_who(row)} ({_loss_of(row)})")
    return kept


def _group_mean(rows: list[dict], name: str) -> Mean | None:
    """The mean of a group over its models; a lookup table is one model, whose error is its measurement's own."""
    there = [row for row in rows if row.get(name) is not None]
    if not there:
        return None
    if there[0]["kind"] == "transformer":
        return mean_of([row[name] for row in there])
    [row] = there
    if name == "gap":
        return Mean(row[name], 0.0, math.inf, 1)  # 0 by construction
    over_seeds = row.get(f"{name}_se") is not None
    return Mean(row[name], error_of(row, name), row[f"{name}_seeds"] - 1 if over_seeds else math.inf, 1)


def _compare_groups(finding: Finding, before: list[dict], after: list[dict], traces: tuple[str, ...], names: list[str]) -> None:
    for name in (*traces, "gap", *names):
        means = _group_mean(before, name), _group_mean(after, name)
        finding.changes[name] = None if None in means else change_of_means(*means)
    finding.judge(traces, names)


def _sizes(experiment: Experiment, rows: list[dict], names: list[str]) -> list[Finding]:
    """Smallest against largest."""
    finding = Finding(SIZES, TITLES[SIZES], "no two sizes")
    kept = _at_same_loss(rows, finding)
    by_group = {group: [row for row in kept if row["group"] == group] for group in experiment.groups()}
    sized = [(of_group[0]["parameters"] or 0, group) for group, of_group in by_group.items() if len(of_group) >= FEWEST]
    (few, small), (many, large) = (min(sized), max(sized)) if sized else ((0, ""), (0, ""))
    if few == many:
        finding.reason = f"no two sizes have {FEWEST} models at the same loss each"
        finding.verdicts = dict.fromkeys(names, OPEN)
        return [finding]
    finding.subject = f"{large} against {small}"
    finding.basis = (
        f"From {small} ({few:,} parameters, {len(by_group[small])} seeds) to {large} ({many:,}, {len(by_group[large])} seeds)"
    )
    _compare_groups(finding, by_group[small], by_group[large], trace_names(experiment), names)
    return [finding]


def _algorithms(experiment: Experiment, rows: list[dict], names: list[str]) -> list[Finding]:
    """Each group against the first."""
    standard, *others = experiment.groups()
    found = []
    for group in others:
        of_both = [row for row in rows if row["group"] in (standard, group)]
        is_table = any(row["group"] == group and row.get("kind") not in (None, "transformer") for row in rows)
        finding = Finding(ALGORITHMS, TABLE_TITLE if is_table else TITLES[ALGORITHMS], f"{group} against {standard}")
        kept = _at_same_loss(of_both, finding)
        before, after = ([row for row in kept if row["group"] == name] for name in (standard, group))
        wanted = [name for name in names if not (is_table and name.startswith("finetune"))]
        few = [
            f"{name} has {len(side)}"
            for name, side, needed in ((standard, before, FEWEST), (group, after, 1 if is_table else FEWEST))
            if len(side) < needed
        ]
        if few:
            finding.reason = f"models at the same loss are too few: {_and(few)}"
            finding.verdicts = dict.fromkeys(wanted, OPEN)
        else:
            finding.basis = f"From {standard} ({len(before)} seeds) to {group}" + ("" if is_table else f" ({len(after)} seeds)")
            _compare_groups(finding, before, after, () if is_table else trace_names(experiment), wanted)
        found.append(finding)
    return found


_COMPARE = {STEPS: _steps, SIZES: _sizes, ALGORITHMS: _algorithms}


def findings_of(experiment: Experiment, rows: list[dict], names: list[str]) -> list[Finding]:
    """The findings of one experiment.

    Args:
        rows: its rows (`pretraining.report.experiment_rows`).
        names: the accuracies, as columns; one that no model has is passed over.
    """
    measured = [name for name in names if any(row.get(name) is not None for row in rows)]
    return _COMPARE[experiment.name](experiment, rows, measured or names)
