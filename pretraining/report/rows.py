"""What is recorded below a folder, as data frames with one row per model.

Two frames describe a tree. `models` has one row per model folder, or per folder of records without weights (a lookup table):

| column | meaning |
| --- | --- |
| `kind` | "transformer", "lookup table" or "words" |
| `job`, `step` | name of the pre-training run, and step of the checkpoint |
| `parameters`, `hidden_size`, `layers`, `heads`, `intermediate_size` | shape; missing without weights |
| `enlarged_rule`, `enlarged_times`, `enlarged_heads` | of a model that enlarge.py wrote: rule, factors of width and heads |
| `enlarged_from`, `enlarged_from_parameters` | SHA-256 of the small model's weights, and its size |

`measured` has the same index and two levels of columns: a quantity and a part of it. Quantities are `gap_sentences`,
`loss_pairs` and so on (nats); `trace`, which is the Fisher trace, and its parts (`trace_tables`, ...); `trace_hutchinson`,
`estimator_difference` (Fisher less Hutchinson, paired), `balanced`, `relative` and `constant_share`; and the accuracies
(fractions) by the names of their records, `probe_pcfg_B`, of label curves with the number of labels, `curve_pcfg_B_ridge_50`.
Parts are `value`, `se` (standard error: over sentences, of accuracies over seeds or draws of the labelled sentences), and for
accuracies `sampling_se` (of the validation sample), `seeds`, `best`, `n`, `majority`, `missing_classes` and `unfinished`.

The columns of `results.csv` are those of `models`, then QUANTITY and QUANTITY_PART, then those of `losses`. An empty cell is a
measurement that does not exist.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pcfg.common.files import AnyPath, InputError, atomic_open, read_json
from pretraining.evaluation import records
from pretraining.evaluation.flatness import balanced_trace
from pretraining.evaluation.records import BalancedTrace, HessianRecord, Record, TracePart, read_records
from pretraining.model.checkpoints import CONFIG_FILE, is_model_folder, read_facts, weights_sha256, without_trunks
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.same_loss import SameLoss

TRANSFORMER = "transformer"
LOOKUP_TABLE = "lookup table"
WORDS = "words"
SHAPE = ["parameters", "hidden_size", "layers", "heads", "intermediate_size"]
ENLARGED = ["enlarged_rule", "enlarged_times", "enlarged_heads", "enlarged_from", "enlarged_from_parameters"]
FACTS = ["kind", "job", "step", *SHAPE, *ENLARGED]
INTEGERS = ["step", *SHAPE, "enlarged_times", "enlarged_heads", "enlarged_from_parameters"]
LOSSES = [f"{part}_{mean}" for part in ("gap", "loss", "entropy", "sampled_loss") for mean in ("sentences", "pairs")]
GAP = "gap_sentences"
SAMPLED_LOSS = "sampled_loss_sentences"
GAP_NAME = "gap"  # of sections and comparisons
MLM_LOSS = "MLM loss"
TRACE = "trace"
HUTCHINSON = "trace_hutchinson"
DIFFERENCE = "estimator_difference"
BALANCED = "balanced"
RELATIVE = "relative"
CONSTANT_SHARE = "constant_share"
COMMON_TRACES = {rule: f"trace_by_{rule}" for rule in TIED_SCALES}  # in the parameters of a larger model, by rule
TRACE_FILES = {"hessian.json": TRACE, "hessian_hutchinson.json": HUTCHINSON}
FLATNESS = [TRACE, HUTCHINSON, DIFFERENCE, BALANCED, RELATIVE, CONSTANT_SHARE]
PARTS = ["tables", "encoder_matrices", "vectors", "head", "added_layers"]
ACCURACY_PARTS = ["value", "se", "sampling_se", "seeds", "best", "n", "majority", "missing_classes", "unfinished"]
COUNTS = ("seeds", "n", "missing_classes", "unfinished")
LOSS_COLUMNS = ["gap", "gap_se", "saturated", "gap_difference", "gap_difference_se", "paired", "equal", "same_loss"]
Number = tuple[float | None, float | None]  # a value and its own standard error; None where there is none


@dataclasses.dataclass(frozen=True)
class Tree:
    """Everything that is recorded at or below a folder; the frames are those of the module's text."""

    models: pd.DataFrame
    measured: pd.DataFrame
    records: list[tuple[str, Path, Record]]  # (model, file, record) of every record, in the order of the models
    paths: dict[str, Path]  # by model its folder
    balanced_parts: dict[str, BalancedTrace]  # by model the parts of its Fisher trace

    @property
    def accuracies(self) -> list[str]:
        """The accuracies that at least one model has, sorted."""
        return [name for name in self.measured.columns.unique(0) if (name, "majority") in self.measured.columns]

    @property
    def has_gaps(self) -> bool:
        """Whether the entropy of the language is known; also where no loss is measured."""
        return bool(self.measured[GAP]["value"].notna().any() or self.measured[SAMPLED_LOSS]["value"].isna().all())

    @property
    def own_sizes(self) -> pd.Series:
        """The parameters of each model before it was enlarged."""
        return self.models["enlarged_from_parameters"].fillna(self.models["parameters"])

    def value(self, model: str, quantity: str, part: str = "value") -> float | None:
        """One number; None where there is none."""
        if model not in self.measured.index or (quantity, part) not in self.measured.columns:
            return None
        number = self.measured.at[model, (quantity, part)]
        return None if pd.isna(number) else float(number)

    def digests(self) -> dict[str, str]:
        """Models by the SHA-256 of their weights, as far as a record says it."""
        hashes: dict[str, str] = {}
        for model, _, record in self.records:
            if digest := record.inputs.get("model", {}).get("sha256"):
                hashes.setdefault(digest, model)
        return hashes

    def reference(self) -> str | None:
        """The model that most comparison records name, else the last of those with a gap."""
        own = self.models.index[self.models["enlarged_rule"].isna()]
        known = [model for model in own if self.value(model, GAP) is not None]
        digests = self.digests()
        comparisons = [record for _, _, record in self.records if isinstance(record, records.ComparisonRecord) and record.gap_a]
        others = [digests.get(record.inputs["other"]["sha256"]) for record in comparisons]
        counted = collections.Counter(model for model in others if model in known)
        return counted.most_common(1)[0][0] if counted else known[-1] if known else None

    def number(self, model: str, quantity: str, times: float = 1.0) -> Number:
        """A quantity of a model; balanced traces and those by rule of enlarge.py for one that is `times` as wide."""
        if quantity == BALANCED or quantity in COMMON_TRACES.values():
            parts = self.balanced_parts.get(model)
            return (None, None) if parts is None else _widened(parts, times)[quantity]
        name = {GAP_NAME: GAP, MLM_LOSS: SAMPLED_LOSS}.get(quantity, quantity)
        error = self.value(model, name, "se")
        return self.value(model, name), self.value(model, name, "sampling_se") if error is None else error

    def estimators_differ(self, model: str) -> bool:
        """Whether the Fisher and Hutchinson traces of a model differ by more than two standard errors, paired by sentences."""
        value, error = self.number(model, DIFFERENCE)
        return value is not None and error is not None and abs(value) > 2 * error

    def readouts(self) -> dict[tuple[str, str], str]:
        """By model and accuracy how it was read out: the solver, and the rate of an AdamW probe."""
        texts: dict[tuple[str, str], str] = {}
        for model, file, record in self.records:
            if isinstance(record, records.CurveRecord):
                texts |= {(model, f"{file.stem}_{point.labels}"): record.solver for point in record.points}
            elif isinstance(record, records.AccuracyRecord):
                rate = record.arguments.get("learning_rate")
                solver = record.arguments.get("solver", "" if rate is None else "adamw")
                texts[model, file.stem] = solver if rate is None else f"{solver}, rate {rate:g}"
        return texts


def _widened(parts: BalancedTrace, times: float) -> dict[str, Number]:
    """The traces of a model in the parameters of one that is `times` as wide, from the parts of its own."""
    balanced = balanced_trace(parts, times=times)
    rest = parts.matrices + parts.vectors / times
    return {
        BALANCED: (balanced.value, balanced.standard_error) if balanced else (None, None),
        COMMON_TRACES["tables"]: (parts.tables * times + parts.head_norm / times + rest, None),
        COMMON_TRACES["head"]: (parts.tables / times + parts.head_norm * times + rest, None),
    }


def model_folders(folder: AnyPath) -> list[Path]:
    """All folders at or below `folder` with a model or with records, except hidden ones and training states.

    A model with a cooled one next to it is left out.
    """
    root = Path(folder)
    visible = {
        path.parent
        for path in root.rglob("*.json")
        if not any(part.startswith(".") or part == "training_state" for part in path.relative_to(root).parts)
    }
    folders = without_trunks(sorted(path for path in visible if is_model_folder(path) or read_records(path)))
    if not folders:
        raise InputError(f"{root}: no model folder and no records in it; measure something first")
    return folders


def _facts(folder: Path, facts: dict) -> dict:
    """The row of `models` of one folder, but for its name."""
    row = {
        "kind": TRANSFORMER if is_model_folder(folder) else WORDS if facts.get("model") == WORDS else LOOKUP_TABLE,
        "job": facts.get("job_name") or (folder.parent if "step" in facts else folder).name,
        "step": facts.get("step"),
    }
    if (folder / CONFIG_FILE).is_file():
        config = ModelConfig.from_transformers(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
        row |= {"parameters": config.parameters, "hidden_size": config.hidden_size, "layers": config.num_hidden_layers}
        row |= {"heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    if enlarged := facts.get("enlarged"):
        row |= {f"enlarged_{name}": enlarged[name] for name in ("rule", "times", "heads")}
        source = enlarged["from"]
        row |= {"enlarged_from": source["weights_sha256"], "enlarged_from_parameters": source["parameters"]}
    return row


def _cells(quantity: str, **parts: float | None) -> dict[tuple[str, str], float | None]:
    return {(quantity, part): value for part, value in parts.items()}


def _measurements(by_file: dict[str, Record], facts: dict) -> dict[tuple[str, str], float | None]:
    """The row of `measured` of one folder."""
    cells: dict[tuple[str, str], float | None] = {}
    for file, record in by_file.items():
        name = Path(file).stem
        if isinstance(record, records.LossRecord):
            for quantity in LOSSES:
                part, mean = quantity.rsplit("_", 1)
                if means := getattr(record, part):
                    value = getattr(means, mean)
                    cells |= _cells(quantity, value=value.mean, se=value.standard_error)
        elif isinstance(record, records.AccuracyRecord):
            cells |= _cells(name, value=record.value, se=record.standard_error, sampling_se=record.sampling_standard_error)
            cells |= _cells(name, seeds=len(record.accuracies), best=record.best_accuracy, n=record.n, majority=record.majority)
            cells |= _cells(name, unfinished=record.unfinished if isinstance(record, records.ProbeRecord) else None)
        elif isinstance(record, records.CurveRecord):
            for point in record.points:
                curve = f"{name}_{point.labels}"
                cells |= _cells(curve, value=point.accuracy.mean, se=point.accuracy.standard_error, n=record.n)
                cells |= _cells(curve, majority=record.majority, missing_classes=point.missing_classes)
                cells |= _cells(curve, sampling_se=point.sampling_standard_error)
        elif isinstance(record, HessianRecord) and (trace := TRACE_FILES.get(file)):
            other = record.hutchinson or record.fisher
            parts: dict[str, HessianRecord | BalancedTrace | TracePart | None]
            parts = {trace: record, DIFFERENCE: other.difference if other else None}
            if trace == TRACE:
                # The other estimator's value counts where that has no record of its own, which is read later.
                parts |= {HUTCHINSON: record.hutchinson, BALANCED: record.balanced, RELATIVE: record.relative}
                parts[CONSTANT_SHARE] = record.constant_share
                cells |= {(f"trace_{part}", "value"): value for part, value in _trace_parts(record, facts).items()}
            for quantity, measured in parts.items():
                if measured is not None:
                    cells |= _cells(quantity, value=measured.value, se=measured.standard_error)
    return cells


def _trace_parts(record: HessianRecord, facts: dict) -> dict[str, float | None]:
    """The parts of a trace; those of added layers are also in the groups that they belong to."""
    if record.parts is None:
        return {}
    groups = {name: part.value for name, part in record.parts.groups.items()}
    added = {f"layer_{layer}" for layer in facts.get("enlarged", {}).get("added_layers", [])}
    return {
        "tables": math.fsum(value for name, value in groups.items() if name.endswith("_table")),
        **{name: groups.get(name) for name in PARTS[1:4]},
        "added_layers": math.fsum(part.value for name, part in record.parts.layers.items() if name in added),
    }


def collect(folder: AnyPath, records_path: AnyPath | None = None) -> Tree:
    """Everything that is recorded at or below `folder`: transformers by size, job and step, records without weights last.

    `records_path`: folder with further records, in which each model has the same relative path; they win.
    """
    root = Path(folder)
    folders = {path.name if path == root else path.relative_to(root).as_posix(): path for path in model_folders(root)}
    facts = {name: read_facts(path) for name, path in folders.items()}
    rows = {name: _facts(path, facts[name]) for name, path in folders.items()}

    def place(name: str) -> tuple:
        row = rows[name]
        return row["kind"] != TRANSFORMER, row.get("parameters", 0), row["job"], row["step"] or 0, name

    names = sorted(rows, key=place)
    models = pd.DataFrame([rows[name] for name in names], index=names, columns=FACTS)
    models[INTEGERS] = models[INTEGERS].astype("Int64")
    places = {name: [path] for name, path in folders.items()}
    if records_path is not None:
        places = {name: [path, Path(records_path) / path.relative_to(root)] for name, path in folders.items()}
    sources = {
        name: {file: (place, record) for place in places[name] for file, record in read_records(place).items()}
        for name in names
    }
    of_models = {name: {file: record for file, (_, record) in sources[name].items()} for name in names}
    cells = [_measurements(of_models[name], facts[name]) for name in names]
    accuracies = sorted({quantity for row in cells for quantity, part in row if part == "majority"}, key=accuracy_order)
    columns = [(quantity, part) for quantity in (*LOSSES, *FLATNESS) for part in ("value", "se")]
    columns += [(f"trace_{part}", "value") for part in PARTS]
    columns += [(name, part) for name in accuracies for part in ACCURACY_PARTS]
    measured = pd.DataFrame({column: [row.get(column) for row in cells] for column in columns}, index=names).astype(float)
    listed = [(name, place / file, record) for name in names for file, (place, record) in sorted(sources[name].items())]
    fisher = {name: of_model.get("hessian.json") for name, of_model in of_models.items()}
    parts = {name: record.balanced for name, record in fisher.items() if isinstance(record, HessianRecord) and record.balanced}
    return Tree(models, measured, listed, folders, parts)


def losses(tree: Tree, criterion: SameLoss, reference: str | None) -> pd.DataFrame:
    """The columns `LOSS_COLUMNS` of each model: its gap and what `SameLoss` says of it.

    The difference to the reference is that of a comparison record (`paired`), else that of the two gaps with a bound of its
    error. A lookup table's output is P itself: its gap is 0, and its difference is minus the reference's gap.
    """
    table = tree.measured[GAP].rename(columns={"value": "gap", "se": "gap_se"})
    is_table = tree.models["kind"] == LOOKUP_TABLE
    table.loc[is_table, ["gap", "gap_se"]] = 0.0
    gap, error = table.loc[reference] if reference in table.index else (np.nan, np.nan)
    table["gap_difference"] = table["gap"] - gap
    table["gap_difference_se"] = table["gap_se"] + error
    table["paired"] = is_table & ~math.isnan(gap)
    for model, (difference, se) in _comparisons_with(tree, reference).items():
        table.loc[model, ["gap_difference", "gap_difference_se", "paired"]] = difference, se, True
    table["paired"] = table["paired"].astype("boolean")
    table = table.join(criterion.judge(table, reference))
    table["paired"] = table["paired"].mask(table["gap_difference"].isna())
    return table[LOSS_COLUMNS]


def _comparisons_with(tree: Tree, reference: str | None) -> dict[str, tuple[float, float]]:
    """By model the paired difference of its gap to the reference's, and its error; the reference's own is 0."""
    if reference not in tree.paths or not is_model_folder(tree.paths[reference]):
        return {}
    digest = weights_sha256(tree.paths[reference])
    differences = {}
    for model, _, record in tree.records:
        if isinstance(record, records.ComparisonRecord) and record.gap_a and record.inputs["other"]["sha256"] == digest:
            mean = record.difference.sentences
            differences[model] = mean.mean, mean.standard_error
    return {**differences, reference: (0.0, 0.0)}


def accuracy_order(name: str) -> tuple:
    """Sorts accuracies: probes first, label curves by their number of labels.

    >>> sorted(["finetune_A", "curve_A_ridge_300", "curve_A_ridge_50", "probe_A"], key=accuracy_order)
    ['probe_A', 'curve_A_ridge_50', 'curve_A_ridge_300', 'finetune_A']
    """
    kind = name.partition("_")[0]
    stem, _, labels = name.rpartition("_")
    place = {"probe": 0, "curve": 1}.get(kind, 2)
    return (place, name.startswith("probe_cond"), stem, int(labels)) if kind == "curve" else (place, "_cond" in name, name, 0)


def accuracy_label(name: str, tasks: Mapping[str, str] | None = None) -> str:
    """The name of an accuracy for people; `tasks`: by names of tasks in records theirs for people.

    >>> accuracy_label("probe_pcfg_B"), accuracy_label("finetune_pcfg_B"), accuracy_label("curve_pcfg_B_ridge_1000")
    ('probe B', 'fine-tuning B', 'B, 1,000 labels (ridge)')
    >>> accuracy_label("curve_brown_genre_ridge_50", {"brown_genre": "genre"})
    'genre, 50 labels (ridge)'
    """
    kind, _, task = name.partition("_pcfg_" if "_pcfg_" in name else "_")
    for record, label in (tasks or {}).items():
        if f"_{record}_" in f"{name}_":
            kind, _, task = name.partition(f"_{record}")
            task = label + task
    if kind.startswith("curve"):
        task, solver, labels = task.rsplit("_", 2)
        features = kind.removeprefix("curve").lstrip("_")  # of the curve, where they are not the default
        return f"{task}, {int(labels):,} labels ({f'{features}, ' if features else ''}{solver})"
    return f"{'fine-tuning' if kind == 'finetune' else kind.replace('_', ' ')} {task}"


def write_csv(path: Path | str, frame: pd.DataFrame) -> None:
    """Write a frame without its index: full precision, booleans as yes and no, nothing for what is missing."""
    words = {True: "yes", False: "no"}
    booleans = [name for name in frame if pd.api.types.is_bool_dtype(frame[name])]
    texts = frame.assign(**{name: frame[name].astype(object).map(words) for name in booleans})
    with atomic_open(path) as file:
        texts.to_csv(file, index=False, lineterminator="\n")


def results(tree: Tree, criterion: SameLoss, reference: str | None, identity: pd.DataFrame) -> pd.DataFrame:
    """The content of `results.csv`; `identity`: by model further columns, such as group and seed."""
    measured = tree.measured.copy()
    measured.loc[tree.models["kind"] == LOOKUP_TABLE, [(GAP, "value"), ("gap_pairs", "value")]] = 0.0  # by construction
    counts = [column for column in measured.columns if column[1] in COUNTS]
    measured[counts] = measured[counts].astype("Int64")
    measured.columns = pd.Index([quantity if part == "value" else f"{quantity}_{part}" for quantity, part in measured.columns])
    of_losses = losses(tree, criterion, reference)[LOSS_COLUMNS[2:]]
    table = pd.concat([tree.models, measured, identity.reindex(tree.models.index), of_losses], axis=1)
    # An enlarged model's job says by which rule it came about.
    enlarged = tree.models["enlarged_rule"].notna()
    suffix = " x " + table["enlarged_times"].astype(str) + ", " + table["enlarged_rule"].astype(str)
    table["job"] = table["job"].where(~enlarged, table["job"] + suffix)
    return table.rename_axis("model").reset_index()
