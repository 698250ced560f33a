"""Comparisons for the report: traces of different sizes in the parameters of one of them, and losses of two models.

A small model enlarged by enlarge.py computes what it did, but its trace depends on how it was enlarged, foremost on which side
of the tied tables was divided (see `pretraining.model.enlarge`). A finding, "this model's trace is smaller than that one's", is
therefore looked at under each rule for which both traces are there; a model that has that shape itself counts under both. Two
traces are told apart when they differ by more than two standard errors, taken as independent.
"""

import dataclasses
import itertools
import math

from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.intervals import ERRORS, told_apart

SHAPE = ("parameters", "hidden_size", "layers", "heads", "intermediate_size")
PARTS = ("tables", "encoder_matrices", "vectors", "head", "added_layers")
VERDICTS = {"larger": "larger than that of", "smaller": "smaller than that of", "not told apart": "not told apart from that of"}


def enlarged_facts(facts: dict) -> dict:
    """The cells of an enlarged model from its `args.json`; none for another model."""
    enlarged = facts.get("enlarged")
    if not enlarged:
        return {}
    return {
        "enlarged_rule": enlarged["rule"],
        "enlarged_times": enlarged["times"],
        "enlarged_heads": enlarged["heads"],
        "enlarged_from": enlarged["from"]["weights_sha256"],
        "enlarged_from_parameters": enlarged["from"]["parameters"],
    }


def trace_parts(record: dict, facts: dict) -> dict:
    """The cells of a trace's parts; those of added layers are also in the groups that they belong to."""
    parts = record.get("parts")
    if parts is None:
        return {}
    values = {name: part["value"] for name, part in parts["groups"].items()}
    tables = [value for name, value in values.items() if name.endswith("_table")]
    added = facts.get("enlarged", {}).get("added_layers", [])
    layers = [part["value"] for name, part in parts["layers"].items() if name in {f"layer_{layer}" for layer in added}]
    cells = {"tables": math.fsum(tables), **{name: values.get(name) for name in PARTS[1:4]}, "added_layers": math.fsum(layers)}
    return {f"trace_{name}": value for name, value in cells.items()}


@dataclasses.dataclass
class Measured:
    """One pre-trained model in the common parameters.

    Attributes:
        label: its job and, unless it has that shape itself, how many times it was enlarged.
        size: its own number of parameters.
        traces: by rule the row of its trace; the same row under each rule if it has the shape itself.
    """

    label: str
    size: int
    traces: dict[str, dict]

    def different(self) -> list[tuple[str, dict]]:
        """The rules and their rows, a model of that shape itself once."""
        found = [(rule, self.traces[rule]) for rule in TIED_SCALES if rule in self.traces]
        return found if "enlarged_rule" in found[0][1] else [("of this shape itself", found[0][1])]


def _last(rows: list[dict]) -> list[Measured]:
    """The models among rows of one shape, each at its last measured step, by their size."""
    models: dict[tuple, Measured] = {}
    for row in sorted(rows, key=lambda row: row["step"] or 0):
        rule = row.get("enlarged_rule")
        size = row.get("enlarged_from_parameters", row["parameters"])
        job = row["job"] if rule is None else f"{row['trained_as']} x {row['enlarged_times']}"
        label = job if row["step"] is None else f"{job}, step {row['step']:,}"
        key = (size, job, row.get("enlarged_heads"))
        if key not in models or models[key].label != label:
            models[key] = Measured(label, size, {})
        models[key].traces |= dict.fromkeys(TIED_SCALES if rule is None else (rule,), row)
    return sorted(models.values(), key=lambda model: (model.size, model.label))


def _order(a: dict, b: dict) -> str:
    """Which of `VERDICTS` holds for a's trace and b's."""
    difference = a["trace"] - b["trace"]
    if abs(difference) <= ERRORS * math.hypot(a.get("trace_se") or 0.0, b.get("trace_se") or 0.0):
        return "not told apart"
    return "larger" if difference > 0 else "smaller"


def _finding(a: Measured, b: Measured) -> str | None:
    """How the traces of two models compare, under each rule; None where no rule has both."""
    orders = {rule: _order(a.traces[rule], b.traces[rule]) for rule in TIED_SCALES if rule in a.traces and rule in b.traces}
    if not orders:
        return None
    first = next(iter(orders.values()))
    if len(orders) == 1:
        [missing] = set(TIED_SCALES) - orders.keys()
        return (
            f"{a.label}: trace {VERDICTS[first]} {b.label} with --tied-scale {next(iter(orders))}. Whether that depends on the "
            f"rule is open: no trace with --tied-scale {missing}."
        )
    if len(set(orders.values())) == 1:
        return f"{a.label}: trace {VERDICTS[first]} {b.label} with both rules."
    found = ", ".join(f"{order} with --tied-scale {rule}" for rule, order in orders.items())
    return f"{a.label} against {b.label}: THE FINDING DEPENDS ON THE RULE, trace {found}."


@dataclasses.dataclass
class SizeComparison:
    """The models that are there in one shape, some of them enlarged to it.

    Attributes:
        title: names the shape.
        models: at their last measured steps, by their own size.
        findings: one sentence a pair of models.
    """

    title: str
    models: list[Measured]
    findings: list[str]

    HEADER = ("model", "own parameters", "rule", "trace", *(name.replace("_", " ") for name in PARTS))

    def lines(self) -> list[list[str]]:
        """A line of texts for each model and rule."""
        lines = []
        for model in self.models:
            for rule, row in model.different():
                error = row.get("trace_se")
                trace = f"{row['trace']:.2f}" + ("" if error is None else f" ± {error:.2f}")
                parts = ["" if row.get(f"trace_{name}") is None else f"{row[f'trace_{name}']:.2f}" for name in PARTS]
                lines.append([model.label, f"{model.size:,}", rule, trace, *parts])
        return lines


def across_sizes(rows: list[dict]) -> list[SizeComparison]:
    """A comparison for each shape that some model was enlarged to, of all models with a trace there."""
    shapes: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("trace") is not None and row["kind"] == "transformer":
            shapes.setdefault(tuple(row[name] for name in SHAPE), []).append(row)
    found = []
    for shape, members in sorted(shapes.items()):
        if not any(row.get("enlarged_rule") for row in members):
            continue
        models = _last(members)
        findings = [finding for a, b in itertools.combinations(models, 2) if (finding := _finding(a, b))]
        found.append(SizeComparison(f"Traces in the parameters of one model, {shape[0]:,} of them", models, findings))
    return found


PAIR_HEADER = ("A", "B", "loss, A minus B (by sentences)", "by pairs", "told apart")


def paired_comparisons(records: list[dict]) -> list[list[str]]:
    """A line of texts for each comparison record: models, differences in nats, and whether they are told apart.

    Args:
        records: `model`, `file`, `record` of every record in the report; a model that is among them is called as there.
    """
    names = {}
    for entry in records:
        if digest := entry["record"]["inputs"].get("model", {}).get("sha256"):
            names.setdefault(digest, entry["model"])
    lines = []
    for entry in records:
        record = entry["record"]
        if record["measurement"] == "comparison":
            means = record["difference"]
            by_sentences = means["sentences"]
            other = names.get(record["inputs"]["other"]["sha256"], record["models"][1])
            numbers = [f"{means[by]['mean']:.6f} ± {means[by]['standard_error']:.6f}" for by in ("sentences", "pairs")]
            apart = told_apart(by_sentences["mean"], by_sentences["standard_error"])
            lines.append([entry["model"], other, *numbers, "yes" if apart else "no"])
    return lines
