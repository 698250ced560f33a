"""The findings' sentences for made-up rows: what holds, what does not, what is undecided, what depends on the rule."""

import pandas as pd
import pytest

from pretraining.report.analysis import Finding, findings_of
from pretraining.report.contract import Entry, Experiment
from pretraining.report.rows import IDENTITY, LOSS_COLUMNS, Joined
from pretraining.report.same_loss import SameLoss

TRACES = ["trace", "trace_by_tables", "trace_by_head"]
NAMES = ["probe_pcfg_A", "probe_pcfg_B"]
WOBBLE = (-0.1, 0.0, 0.1)  # of seeds 0, 1, 2, around a mean


def model(group, seed, step=100, gap=0.01, equal=True, parameters=1000, **values):
    """A row; its values wobble with the seed by a tenth of their unit, accuracies by a thousandth."""
    row = {"group": group, "seed": seed, "step": step, "kind": "transformer", "parameters": parameters}
    row |= {"gap": gap + WOBBLE[seed] / 1000, "gap_se": 1e-5, "saturated": gap <= 0.02}
    row |= {"gap_difference": gap - 0.01, "gap_difference_se": 1e-5, "equal": equal}
    for name, value in values.items():
        row[name] = value + WOBBLE[seed] / (100 if name in NAMES else 1)
    return row


def joined(rows) -> Joined:
    """The rows as data frames: identity and loss in one, quantities and their parts in the other."""
    frame = pd.DataFrame(rows, columns=[*IDENTITY, *LOSS_COLUMNS])
    frame = frame.astype(dict.fromkeys(("saturated", "equal"), "boolean") | dict.fromkeys(("seed", "step"), "Int64"))
    frame["paired"] = frame["equal"].notna()
    frame["same_loss"] = frame["saturated"] & frame["equal"]
    columns = {(name, "value"): [row.get(name) for row in rows] for name in (*TRACES, *NAMES)}
    for name in NAMES:
        columns |= {(name, part): [row.get(f"{name}_{part}") for row in rows] for part in ("se", "sampling_se", "seeds")}
    return Joined(frame, pd.DataFrame(columns).astype(float))


def findings(name, rows, criterion=SameLoss()) -> list[Finding]:  # noqa: B008
    entries = tuple(
        Entry(group=row["group"], seed=row["seed"], step=row["step"], folder=f"models/{index}")
        for index, row in enumerate(rows)
    )
    return findings_of(Experiment(name=name, entries=entries), joined(rows), NAMES, criterion)


def group(name, wobble=1.0, seeds=(0, 1, 2), **values):
    rows = [model(name, seed, **values) for seed in seeds]
    for row in rows:
        for column in values.keys() & {*TRACES, *NAMES}:
            row[column] = values[column] + wobble * (row[column] - values[column])
    return rows


def run(traces, accuracies, gaps=(0.05, 0.015, 0.01), seeds=(0, 1, 2)):
    """Three checkpoints of an optimizer; the last one wobbles twice as much, so that differences do."""
    rows = []
    for index, (trace, accuracy, gap) in enumerate(zip(traces, accuracies, gaps, strict=True)):
        wobble = 1.0 + index
        rows += group("AdamW", wobble, seeds, step=100 * index, gap=gap, trace=trace, probe_pcfg_A=accuracy, probe_pcfg_B=0.5)
    return rows


def test_steps_holds_for_one_task_only():
    [finding] = findings("steps", run((50, 40, 30), (0.5, 0.6, 0.65)))
    assert finding.verdicts == {"probe_pcfg_A": "holds", "probe_pcfg_B": "undecided"}
    assert finding.sentence == (
        "Training on after the loss has converged lowers the trace and raises the accuracy (AdamW): holds for probe A; "
        "undecided for probe B. From the first checkpoint at the same loss (step 100) to the last (step 200), 3 seeds: "
        "trace -10.000 [-10.248, -9.752], as in the paper; gap -0.005 nats (no interval: no spread over seeds, or one only); "
        "probe A +5.00 [+4.75, +5.25] points, as in the paper; probe B +0.00 [-0.25, +0.25] points, not distinguishable from 0."
    )


@pytest.mark.parametrize(
    "traces, accuracies, verdict",
    [
        ((50, 30, 40), (0.5, 0.6, 0.65), "does not hold"),  # the trace rises
        ((50, 40, 30), (0.5, 0.65, 0.6), "does not hold"),  # the accuracy falls
        ((50, 40, 40.1), (0.5, 0.6, 0.65), "undecided"),  # the trace stays
        ((50, 40, 40.1), (0.5, 0.65, 0.6), "does not hold"),
    ],
)
def test_steps_otherwise(traces, accuracies, verdict):
    [finding] = findings("steps", run(traces, accuracies))
    assert finding.verdicts["probe_pcfg_A"] == verdict and f"{verdict} for probe A" in finding.headline
    assert verdict != "does not hold" or ", against the paper" in finding.sentence


def test_steps_that_can_not_be_compared():
    [one] = findings("steps", run((50, 40, 30), (0.5, 0.6, 0.65), seeds=(0,)))
    assert "undecided, 1 of 1 runs can be compared, an interval takes 2." in one.sentence
    [late] = findings("steps", run((50, 40, 30), (0.5, 0.6, 0.65), gaps=(0.05, 0.03, 0.01)))
    assert "0 of 3 runs" in late.sentence and "AdamW seed 2 (no earlier checkpoint is saturated)" in late.sentence
    [never] = findings("steps", run((50, 40, 30), (0.5, 0.6, 0.65), gaps=(0.05, 0.01, 0.03)))
    assert "AdamW seed 1 (last checkpoint not saturated, gap 0.0300 ± 0.0000 nats)" in never.sentence
    rows = run((50, 40, 30), (0.5, 0.6, 0.65))
    rows[-1] = {name: rows[-1][name] for name in ("group", "seed", "step")}  # seed 2's last checkpoint is not there
    [gone] = findings("steps", rows)
    assert "AdamW seed 2 (last checkpoint missing)" in gone.sentence and "2 seeds" in gone.basis


def sizes(head, tables=30, accuracy=0.7, gap=0.01, equal=True):
    small = group("small", parameters=10, trace_by_tables=50, trace_by_head=50, probe_pcfg_A=0.6)
    middle = group("middle", parameters=20, gap=0.03, trace_by_tables=45, trace_by_head=45, probe_pcfg_A=0.65)
    large = {"parameters": 30, "gap": gap, "equal": equal, "trace_by_tables": tables, "trace_by_head": head}
    return [*middle, *group("large", **large, probe_pcfg_A=accuracy), *small]


@pytest.mark.parametrize(
    "head, tables, accuracy, verdict",
    [
        (30, 30, 0.7, "holds"),
        (60, 30, 0.7, "depends on the rule of enlarging"),
        (50, 30, 0.7, "depends on the rule of enlarging"),
        (60, 60, 0.7, "does not hold"),
        (60, 30, 0.5, "does not hold"),  # whatever the rule: the accuracy falls
        (30, 30, 0.6, "undecided"),
    ],
)
def test_sizes(head, tables, accuracy, verdict):
    [finding] = findings("sizes", sizes(head, tables, accuracy))
    assert (
        finding.verdicts == {"probe_pcfg_A": verdict} and f"(large against small): {verdict} for probe A." in finding.sentence
    )
    assert f"trace (head) {head - 50:+.3f} [" in finding.sentence and f"trace (tables) {tables - 50:+.3f} [" in finding.sentence
    assert "From small (10 parameters, 3 seeds) to large (30, 3 seeds)" in finding.sentence
    assert "middle seed 1 (not saturated, gap 0.0300 ± 0.0000 nats)" in finding.sentence


def test_sizes_that_can_not_be_compared():
    rows = sizes(30)
    for row in rows:
        row.pop("trace_by_head")
    [finding] = findings("sizes", rows)
    assert finding.verdicts == {"probe_pcfg_A": "undecided"} and "no trace (head)" in finding.sentence
    [finding] = findings("sizes", sizes(30, gap=0.019, equal=False))
    assert "undecided, no two sizes have 2 models at the same loss each." in finding.sentence
    assert "large seed 0 (not equal to the reference within the margin, +0.0090 ± 0.0000 nats)" in finding.sentence


def lookup_table(accuracy, error=0.001, equal=True):
    row = {"group": "lookup table", "seed": None, "step": None, "kind": "lookup table", "gap": 0.0, "saturated": True}
    row |= {"gap_difference": -0.01, "gap_difference_se": 1e-5, "equal": equal}
    return row | {"probe_pcfg_A": accuracy, "probe_pcfg_A_se": error, "probe_pcfg_A_seeds": 3}


def test_algorithms():
    standard = group("standard", gap=0.008, trace=30, probe_pcfg_A=0.7)
    adversarial = group("adversarial", trace=60, probe_pcfg_A=0.6)
    first, table = findings("algorithms", [*standard, *adversarial, lookup_table(0.5)])
    assert (
        "(adversarial against standard): holds for probe A. From standard (3 seeds) to adversarial (3 seeds): trace +30.000"
        in (first.sentence)
    )
    assert "The lookup table, at the same loss, has a lower accuracy (lookup table against standard): holds" in table.sentence
    assert "trace" not in table.sentence and "probe A -20.00 [" in table.sentence
    _, higher = findings("algorithms", [*standard, *adversarial, lookup_table(0.8)])
    assert higher.verdicts == {"probe_pcfg_A": "does not hold"}
    first, far = findings("algorithms", [*standard, *group("adversarial", gap=0.05, trace=60), lookup_table(0.5, equal=False)])
    assert "undecided, models at the same loss are too few: adversarial has 0. Left out: adversarial seed 0" in first.sentence
    assert "lookup table has 0" in far.sentence and "lookup table (not equal to the reference" in far.sentence


def test_a_missing_comparison_is_named():
    rows = group("standard", trace=30, probe_pcfg_A=0.7) + group("adversarial", equal=None, trace=60, probe_pcfg_A=0.6)
    [finding] = findings("algorithms", rows)
    assert "adversarial seed 0 (not compared with the reference)" in finding.sentence


def test_no_verdict_on_groups_that_have_the_reference_s_loss_but_not_each_other_s():
    standard = group("standard", gap=0.002, trace=30, probe_pcfg_A=0.7)
    adversarial = group("adversarial", gap=0.0185, trace=60, probe_pcfg_A=0.6)
    [finding] = findings("algorithms", [*standard, *adversarial])
    assert finding.verdicts == {"probe_pcfg_A": "undecided"} and not finding.changes
    assert "not the same loss, mean gaps differ by +0.0165 ± 0.0000 nats, margin ±0.01" in finding.sentence
    [finding] = findings("algorithms", [*standard, *adversarial], SameLoss(margin=0.02))
    assert finding.verdicts == {"probe_pcfg_A": "holds"}


def test_steps_compare_with_the_first_checkpoint_at_the_loss_of_the_last():
    rows = run((50, 40, 30, 20), (0.5, 0.6, 0.65, 0.7), gaps=(0.05, 0.0195, 0.0145, 0.005))
    [finding] = findings("steps", rows)
    assert "From the first checkpoint at the same loss (step 200) to the last (step 300), 3 seeds" in finding.basis
    [finding] = findings("steps", rows, SameLoss(margin=0.001))
    assert finding.reason and "AdamW seed 0 (no earlier checkpoint has the same loss as the last)" in finding.left_out
