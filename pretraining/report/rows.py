"""What is recorded below a folder, as data frames: one row per model, and one row per model of an experiment.

Two frames describe a tree. `models` has one row per model folder, or per folder of records without weights (a lookup table):

| column | meaning |
| --- | --- |
| `kind` | "transformer" or "lookup table" |
| `job`, `step` | name of the pre-training run, and step of the checkpoint |
| `parameters`, `hidden_size`, `layers`, `heads`, `intermediate_size` | shape; missing without weights |
| `enlarged_rule`, `enlarged_times`, `enlarged_heads` | of a model that enlarge.py wrote: rule, factors of width and heads |
| `enlarged_from`, `enlarged_from_parameters` | SHA-256 of the small model's weights, and its size |

`measured` has the same index and two levels of columns: a quantity and a part of it. Quantities are `gap_sentences`,
`loss_pairs` and so on (nats), `trace`, `trace_hutchinson`, the parts of the trace (`trace_tables`, ...), and the accuracies by
the names of their records (`probe_pcfg_B`; fractions). Parts are `value`, `se` (standard error: over sentences, for accuracies
over seeds), and for accuracies `sampling_se` (of the validation sample), `seeds`, `best`, `n` and `majority`.

The columns of `results.csv` are those of `models`, then QUANTITY and QUANTITY_PART, then those of `losses`. An empty cell is a
measurement that does not exist.
"""

import collections
import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd

from pcfg.common.files import InputError, atomic_open, read_json
from pretraining.evaluation.records import AccuracyRecord, ComparisonRecord, HessianRecord, LossRecord, Record, read_records
from pretraining.model.checkpoints import CONFIG_FILE, is_model_folder, read_facts, weights_sha256, without_trunks
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.contract import MODELS, Entry, Experiment, Experiments, Status
from pretraining.report.same_loss import MARGIN, MAX_GAP

TRANSFORMER = "transformer"
LOOKUP_TABLE = "lookup table"
SHAPE = ["parameters", "hidden_size", "layers", "heads", "intermediate_size"]
ENLARGED = ["enlarged_rule", "enlarged_times", "enlarged_heads", "enlarged_from", "enlarged_from_parameters"]
FACTS = ["kind", "job", "step", *SHAPE, *ENLARGED]
INTEGERS = ["step", *SHAPE, "enlarged_times", "enlarged_heads", "enlarged_from_parameters"]
LOSSES = [f"{part}_{mean}" for part in ("gap", "loss", "entropy", "sampled_loss") for mean in ("sentences", "pairs")]
GAP = "gap_sentences"
TRACE = "trace"
TRACE_FILES = {"hessian.json": TRACE, "hessian_hutchinson.json": "trace_hutchinson"}
PARTS = ["tables", "encoder_matrices", "vectors", "head", "added_layers"]
ACCURACY_PARTS = ["value", "se", "sampling_se", "seeds", "best", "n", "majority"]
COMMON_TRACES = {rule: f"trace_by_{rule}" for rule in TIED_SCALES}  # in the parameters of the largest model, by rule
COMPARISON = "comparison_*.json"  # a plan's name for a record whose name has the hash of the reference's weights
IDENTITY = ["experiment", "group", "seed", "step", "run", "folder", "kind", "parameters"]
LOSS_COLUMNS = ["gap", "gap_se", "saturated", "gap_difference", "gap_difference_se", "paired", "equal", "same_loss"]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Everything that is recorded at or below a folder; the frames are those of the module's text."""

    models: pd.DataFrame
    measured: pd.DataFrame
    records: list[tuple[str, Path, Record]]  # (model, file, record) of every record, in the order of the models
    paths: dict[str, Path]  # by model its folder

    @property
    def accuracies(self) -> list[str]:
        """The accuracies that at least one model has, sorted."""
        return [name for name in self.measured.columns.unique(0) if (name, "majority") in self.measured.columns]

    @property
    def own_sizes(self) -> pd.Series:
        """The parameters of each model before it was enlarged."""
        return self.models["enlarged_from_parameters"].fillna(self.models["parameters"])

    def digests(self) -> dict[str, str]:
        """Models by the SHA-256 of their weights, as far as a record says it."""
        hashes: dict[str, str] = {}
        for model, _, record in self.records:
            if digest := record.inputs.get("model", {}).get("sha256"):
                hashes.setdefault(digest, model)
        return hashes


def model_folders(folder: Path | str) -> list[Path]:
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
        "kind": TRANSFORMER if is_model_folder(folder) else LOOKUP_TABLE,
        "job": facts.get("job_name") or (folder.parent if "step" in facts else folder).name,
        "step": facts.get("step"),
    }
    if (folder / CONFIG_FILE).is_file():
        config = ModelConfig.from_transformers(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
        layers = config.num_hidden_layers
        heads = config.num_attention_heads
        shape = (config.parameters, config.hidden_size, layers, heads, config.intermediate_size)
        row |= dict(zip(SHAPE, shape, strict=True))
    if enlarged := facts.get("enlarged"):
        source = enlarged["from"]
        values = (enlarged["rule"], enlarged["times"], enlarged["heads"], source["weights_sha256"], source["parameters"])
        row |= dict(zip(ENLARGED, values, strict=True))
    return row


def _measurements(records: dict[str, Record], facts: dict) -> dict[tuple[str, str], float | None]:
    """The row of `measured` of one folder."""
    cells: dict[tuple[str, str], float | None] = {}
    for file, record in records.items():
        name = Path(file).stem
        if isinstance(record, LossRecord):
            for quantity in LOSSES:
                part, mean = quantity.rsplit("_", 1)
                if means := getattr(record, part):
                    value = getattr(means, mean)
                    cells |= {(quantity, "value"): value.mean, (quantity, "se"): value.standard_error}
        elif isinstance(record, AccuracyRecord):
            errors = record.standard_error, record.sampling_standard_error
            values = record.value, *errors, len(record.accuracies), record.best_accuracy, record.n, record.majority
            cells |= {(name, part): value for part, value in zip(ACCURACY_PARTS, values, strict=True)}
        elif isinstance(record, HessianRecord) and (trace := TRACE_FILES.get(file)):
            cells |= {(trace, "value"): record.value, (trace, "se"): record.standard_error}
            if trace == TRACE:
                cells |= {(f"trace_{part}", "value"): value for part, value in _trace_parts(record, facts).items()}
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


def collect(folder: Path | str) -> Tree:
    """Everything that is recorded at or below `folder`: transformers by size, job and step, lookup tables last."""
    root = Path(folder)
    rows = []
    for path in model_folders(root):
        relative = path.relative_to(root).as_posix()
        facts = read_facts(path)
        rows.append((path.name if relative == "." else relative, path, _facts(path, facts), read_records(path), facts))
    rows.sort(key=lambda r: (r[2]["kind"] == LOOKUP_TABLE, r[2].get("parameters", 0), r[2]["job"], r[2]["step"] or 0, r[0]))
    names = [row[0] for row in rows]
    models = pd.DataFrame([row[2] for row in rows], index=names, columns=FACTS)
    models[INTEGERS] = models[INTEGERS].astype("Int64")
    cells = [_measurements(row[3], row[4]) for row in rows]
    accuracies = sorted({quantity for row in cells for quantity, part in row if part == "majority"})
    traces = list(TRACE_FILES.values())
    columns = [(quantity, part) for quantity in (*LOSSES, *traces) for part in ("value", "se")]
    columns += [(f"trace_{part}", "value") for part in PARTS]
    columns += [(name, part) for name in accuracies for part in ACCURACY_PARTS]
    measured = pd.DataFrame({column: [row.get(column) for row in cells] for column in columns}, index=names).astype(float)
    records = [(name, path / file, record) for name, path, _, of_model, _ in rows for file, record in sorted(of_model.items())]
    return Tree(models, measured, records, {row[0]: row[1] for row in rows})


def own_error(of_quantity: pd.DataFrame) -> pd.Series:
    """The error of single models: over seeds where there are several, else over the validation sample (or sentences)."""
    return of_quantity["se"].fillna(of_quantity["sampling_se"]) if "sampling_se" in of_quantity else of_quantity["se"]


def losses(tree: Tree, experiments: Experiments) -> pd.DataFrame:
    """The columns `LOSS_COLUMNS` of each model: its gap and what `SameLoss` says of it.

    The difference to the reference is that of a comparison record (`paired`), else that of the two gaps with a bound of its
    error. A lookup table's output is P itself: its gap is 0, and its difference is minus the reference's gap.
    """
    table = tree.measured[GAP].rename(columns={"value": "gap", "se": "gap_se"})
    is_table = tree.models["kind"] == LOOKUP_TABLE
    table.loc[is_table, ["gap", "gap_se"]] = 0.0
    gap, error = table.loc[experiments.reference] if experiments.reference in table.index else (np.nan, np.nan)
    table["gap_difference"] = table["gap"] - gap
    table["gap_difference_se"] = table["gap_se"] + error
    table["paired"] = is_table & ~math.isnan(gap)
    for model, (difference, se) in _comparisons_with(tree, experiments.reference).items():
        table.loc[model, ["gap_difference", "gap_difference_se", "paired"]] = difference, se, True
    table["paired"] = table["paired"].astype("boolean")
    table = table.join(experiments.criterion.judge(table, experiments.reference))
    table["paired"] = table["paired"].mask(table["gap_difference"].isna())
    return table[LOSS_COLUMNS]


def _comparisons_with(tree: Tree, reference: str | None) -> dict[str, tuple[float, float]]:
    """By model the paired difference of its gap to the reference's, and its error; the reference's own is 0."""
    if reference not in tree.paths or not is_model_folder(tree.paths[reference]):
        return {}
    digest = weights_sha256(tree.paths[reference])
    differences = {}
    for model, _, record in tree.records:
        if isinstance(record, ComparisonRecord) and record.gap_a and record.inputs["other"]["sha256"] == digest:
            mean = record.difference.sentences
            differences[model] = mean.mean, mean.standard_error
    return {**differences, reference: (0.0, 0.0)}


def infer_experiments(tree: Tree) -> Experiments:
    """The contract of a tree without `experiments.json`: one experiment with a group per job.

    For each shape to which models were enlarged there is one more, of the models that have a trace in its parameters. The
    reference is the model that most comparison records name, else the last of those with a gap.
    """
    models = tree.models
    own = models[models["enlarged_rule"].isna()]
    labels = _labels(own)
    steps = [None if pd.isna(step) else int(step) for step in own["step"]]
    entries = [
        Entry(group=str(label), seed=None, step=step, folder=model)
        for (model, label), step in zip(labels.items(), steps, strict=True)
    ]
    experiments = [Experiment(name=MODELS, entries=tuple(entries))] if entries else []
    digests = tree.digests()
    known = own.index[tree.measured.loc[own.index, (GAP, "value")].notna()]
    comparisons = [record for _, _, record in tree.records if isinstance(record, ComparisonRecord) and record.gap_a]
    others = [digests.get(record.inputs["other"]["sha256"]) for record in comparisons]
    counted = collections.Counter(model for model in others if model in known)
    reference = counted.most_common(1)[0][0] if counted else known[-1] if len(known) else None
    with_trace = models[tree.measured[TRACE]["value"].notna() & (models["kind"] == TRANSFORMER)]
    for shape, members in with_trace.groupby(SHAPE):
        if members["enlarged_rule"].notna().any():
            name = f"{MODELS}_of_{shape[0]}_parameters"
            experiments.append(Experiment(name=name, kind=MODELS, entries=_of_shape(tree, members, labels, digests)))
    return Experiments(
        scale="all models of the folder",
        seeds=(),
        tasks=(),
        saturated=MAX_GAP,
        margin=MARGIN,
        reference=reference,
        experiments=tuple(experiments),
        inferred=True,
    )


def _labels(models: pd.DataFrame) -> pd.Series:
    """Names of the runs: their jobs, else the folders of the checkpoints, else the models, whichever first are distinct."""
    names = models.index.to_series()
    folders = names.where(models["step"].isna() | ~names.str.contains("/"), names.str.rpartition("/")[0])
    jobs = models["job"].where(models["kind"] == TRANSFORMER, names)
    for labels in (jobs, folders):
        if not pd.DataFrame({"label": labels, "step": models["step"]}).duplicated().any():
            return labels
    return names


def _of_shape(tree: Tree, members: pd.DataFrame, labels: pd.Series, digests: dict[str, str]) -> tuple[Entry, ...]:
    """The entries of models of one shape, each run at its last step: own models, and by rule those enlarged to it."""
    runs: dict[tuple, Entry] = {}
    for model, row in members.sort_values("step", kind="stable", na_position="first").iterrows():
        step = None if pd.isna(row["step"]) else int(row["step"])
        if pd.isna(row["enlarged_rule"]):
            runs[labels[model], 0] = Entry(group=labels[model], seed=None, step=step, folder=model)
            continue
        group = f"{row['job']} x {row['enlarged_times']}"
        key = group, int(row["enlarged_heads"])
        before = runs.get(key)
        common = before.common if before and before.step == step else {}
        folder = digests.get(row["enlarged_from"]) or (before.folder if common and before else model)
        runs[key] = Entry(group=group, seed=None, step=step, folder=folder, common={**common, row["enlarged_rule"]: model})
    repeated = {group for group, times in collections.Counter(group for group, _ in runs).items() if times > 1}
    named = [
        entry.model_copy(update={"group": f"{group}, {heads} x heads"}) if group in repeated else entry
        for (group, heads), entry in runs.items()
    ]
    size = tree.own_sizes
    return tuple(sorted(named, key=lambda e: (min(size[m] for m in (e.common.values() or [e.folder])), e.group)))


def why_missing(path: str, experiments: Experiments, statuses: dict[str, Status]) -> str:
    """The command that should have made `path`, and its state."""
    states = {"done": "is done, but did not make it", "blocked": "is blocked", "not due": "is not due", "failed": "failed"}
    reasons = []
    for command in experiments.makers(path):
        status = statuses.get(command.name)
        reason = f"`{command.name}` {states[status.state] if status else 'has not run'}"
        if status and status.state == "failed":
            reason += "" if status.exit_code is None else f" with exit code {status.exit_code}"
            reason += f", see {status.log}" if status.log else ""
        elif status and status.why:
            reason += f" ({status.why})"
        reasons.append(reason)
    return "; ".join(reasons) or "no command of the plan makes it"


def runs_of(experiment: Experiment) -> dict[tuple[str, int | None], str]:
    """By (group, seed) the name of the run; groups that share a model are one, since they are not independent."""
    names: dict[tuple[str, int | None], str] = {}
    owners: dict[str, str] = {}
    for entry in experiment.entries:
        key = entry.group, entry.seed
        name = names.setdefault(key, entry.group if entry.seed is None else f"{entry.group} seed {entry.seed}")
        first = owners.setdefault(entry.folder, name)
        names = {other: first if now == name else now for other, now in names.items()}
        owners = {folder: first if now == name else now for folder, now in owners.items()}
    return names


def accuracy_names(tree: Tree, experiments: Experiments) -> list[str]:
    """The accuracies that the experiments are about, probes first."""
    if experiments.inferred:
        return sorted(tree.accuracies, key=lambda name: (not name.startswith("probe_"), name.startswith("probe_cond"), name))
    probes = [f"{experiments.probe}_pcfg_{task}" for task in experiments.tasks]
    return [*probes, *(f"finetune_pcfg_{task}" for task in experiments.finetune_tasks)]


def accuracy_label(name: str) -> str:
    """The name of an accuracy for people.

    >>> accuracy_label("probe_pcfg_B"), accuracy_label("finetune_pcfg_B"), accuracy_label("probe_my_task")
    ('probe B', 'fine-tuning B', 'probe my_task')
    """
    kind, _, task = name.partition("_pcfg_" if "_pcfg_" in name else "_")
    return f"{'fine-tuning' if kind == 'finetune' else kind.replace('_', ' ')} {task}"


def trace_names(experiment: Experiment) -> list[str]:
    """The traces that an experiment compares: the models' own, or across shapes both of the largest model's parameters."""
    return list(COMMON_TRACES.values()) if experiment.has_common_traces else [TRACE]


@dataclasses.dataclass(frozen=True)
class Joined:
    """The models of the experiments, joined with what was measured of them; one row per entry, in their order."""

    # rows: the columns `IDENTITY` and `LOSS_COLUMNS`, and `missing`, a list of texts. `kind` is missing if the model is.
    rows: pd.DataFrame
    values: pd.DataFrame  # same index; quantities (traces, accuracies) and their parts, as in `Tree.measured`

    def of(self, quantity: str) -> pd.DataFrame:
        """The parts of a quantity, the gap and its difference to the reference among them."""
        if quantity in ("gap", "gap_difference"):
            return self.rows[[quantity, f"{quantity}_se"]].set_axis(["value", "se"], axis=1)
        return self.values[quantity]

    def select(self, rows: pd.Series | np.ndarray | list) -> "Joined":
        """Some of the models, by a mask or by their labels in the index."""
        return Joined(self.rows.loc[rows], self.values.loc[rows])


def join(tree: Tree, experiments: Experiments, statuses: dict[str, Status]) -> Joined:
    """Join the contract with the tree; what is missing is named, with the command that should have made it."""
    identity = []
    traces = []
    names = accuracy_names(tree, experiments)
    for experiment in experiments.experiments:
        runs = runs_of(experiment)
        for entry in experiment.entries:
            run = runs[entry.group, entry.seed]
            identity.append((experiment.name, entry.group, entry.seed, entry.step, run, entry.folder))
            traces.append(_common_traces(tree, experiment, entry))
    rows = pd.DataFrame(identity, columns=IDENTITY[:6]).astype({"seed": "Int64", "step": "Int64"})
    facts = pd.concat([tree.models["kind"], tree.own_sizes.rename("parameters"), losses(tree, experiments)], axis=1)
    rows = rows.join(facts.reindex(rows["folder"]).reset_index(drop=True))
    by_rule = pd.DataFrame(
        {(COMMON_TRACES[rule], part): [of[rule][part] for of in traces] for rule in TIED_SCALES for part in ("value", "se")}
    )
    known = tree.measured[[name for name in (TRACE, *names) if name in tree.measured.columns.unique(0)]]
    values = pd.concat([known.reindex(rows["folder"]).reset_index(drop=True), by_rule], axis=1)
    empty = pd.MultiIndex.from_product([[name for name in names if name not in tree.accuracies], ACCURACY_PARTS])
    values = values.reindex(columns=values.columns.append(empty))
    rows["missing"] = _missing(experiments, statuses, rows, values, names)
    return Joined(rows, values)


def _common_traces(tree: Tree, experiment: Experiment, entry: Entry) -> dict[str, pd.Series]:
    """By rule the trace of one model, and its error, in the parameters of the experiment's largest one."""
    traces = dict.fromkeys(TIED_SCALES, pd.Series({"value": np.nan, "se": np.nan}))
    if not experiment.has_common_traces or entry.folder not in tree.paths:
        return traces
    # The largest model itself may be missing: the enlarged ones have its size.
    existing = [other for other in experiment.entries if other.folder in tree.paths]
    folders = {folder for other in existing for folder in (other.folder, *other.common.values())}
    largest = tree.models["parameters"].reindex(list(folders)).max()
    for rule in TIED_SCALES:
        folder = entry.common.get(rule, "") if entry.common else entry.folder
        if folder not in tree.paths:
            continue
        facts = tree.models.loc[folder, ["enlarged_rule", "parameters", "enlarged_from_parameters"]]
        if entry.common and tuple(facts) != (rule, largest, tree.own_sizes[entry.folder]):
            raise InputError(
                f"experiment {experiment.name}, group {entry.group!r}: {folder} is not {entry.folder} enlarged with "
                f"--tied-scale {rule} to {largest:,} parameters; enlarge it again"
            )
        if facts["parameters"] == largest:
            traces[rule] = tree.measured.loc[folder, TRACE]
    return traces


def _missing(
    experiments: Experiments, statuses: dict[str, Status], rows: pd.DataFrame, values: pd.DataFrame, names: list[str]
) -> list[list[str]]:
    """Per entry of the experiments what does not exist, and why: one text per reason; nothing if nobody planned them."""
    if experiments.inferred:
        return [[] for _ in range(len(rows))]
    texts = []
    planned = [(experiment, entry) for experiment in experiments.experiments for entry in experiment.entries]
    for (experiment, entry), row in zip(planned, rows.itertuples(), strict=True):
        if not isinstance(row.kind, str):
            texts.append([f"missing; {why_missing(entry.folder, experiments, statuses)}"])
            continue
        unknown = values.loc[row.Index].xs("value", level=1).isna()
        wanted = {}  # file by label, of what does not exist
        if row.kind == TRANSFORMER:
            if pd.isna(row.gap):
                wanted["gap"] = f"{entry.folder}/loss.json"
            if pd.isna(row.paired) or not row.paired:
                wanted["comparison with the reference"] = f"{entry.folder}/{COMPARISON}"
            for name in filter(unknown.get, trace_names(experiment)):
                wanted[trace_label(name)] = f"{entry.common.get(name.removeprefix('trace_by_'), entry.folder)}/hessian.json"
        for name in filter(unknown.get, names):
            file = f"{entry.folder}/{name}.json"
            # Fine-tuning is expected only where a command says that it makes it.
            if not name.startswith("finetune") or experiments.is_named(file):
                wanted[accuracy_label(name)] = file
        reasons: dict[str, list[str]] = {}
        for label, file in wanted.items():
            reasons.setdefault(why_missing(file, experiments, statuses), []).append(f"no {label}")
        texts.append([f"{', '.join(labels)}; {reason}" for reason, labels in reasons.items()])
    return texts


def trace_label(name: str) -> str:
    """The name of a trace, with its rule of enlarging, or of the gap, for people.

    >>> trace_label("gap"), trace_label("trace"), trace_label("trace_by_head")
    ('gap', 'trace', 'trace (head)')
    """
    return f"trace ({name.removeprefix('trace_by_')})" if name in COMMON_TRACES.values() else name


def _flat(values: pd.DataFrame) -> pd.DataFrame:
    """A frame of quantities and parts with the columns of a CSV file; counts as integers."""
    flat = values.copy()
    counts = [column for column in values.columns if column[1] in ("seeds", "n")]
    flat[counts] = flat[counts].astype("Int64")
    flat.columns = pd.Index([quantity if part == "value" else f"{quantity}_{part}" for quantity, part in values.columns])
    return flat


def write_csv(path: Path | str, frame: pd.DataFrame) -> None:
    """Write a frame without its index: full precision, booleans as yes and no, nothing for what is missing."""
    words = {True: "yes", False: "no"}
    booleans = [name for name in frame if pd.api.types.is_bool_dtype(frame[name])]
    texts = frame.assign(**{name: frame[name].astype(object).map(words) for name in booleans})
    with atomic_open(path) as file:
        texts.to_csv(file, index=False, lineterminator="\n")


def results(tree: Tree, experiments: Experiments, joined: Joined) -> pd.DataFrame:
    """The content of `results.csv`."""
    seeds = joined.rows.dropna(subset="seed").drop_duplicates("folder", keep="last").set_index("folder")["seed"]
    measured = tree.measured.copy()
    measured.loc[tree.models["kind"] == LOOKUP_TABLE, [(GAP, "value"), ("gap_pairs", "value")]] = 0.0  # by construction
    of_losses = losses(tree, experiments)[LOSS_COLUMNS[2:]]
    seed = seeds.reindex(tree.models.index).rename("seed")
    table = pd.concat([tree.models, _flat(measured), seed, of_losses], axis=1)
    # An enlarged model's job says by which rule it came about.
    enlarged = tree.models["enlarged_rule"].notna()
    suffix = " x " + table["enlarged_times"].astype(str) + ", " + table["enlarged_rule"].astype(str)
    table["job"] = table["job"].where(~enlarged, table["job"] + suffix)
    return table.rename_axis("model").reset_index()


def experiment_table(joined: Joined) -> pd.DataFrame:
    """The content of `experiments.csv`."""
    parts = [column for column in joined.values.columns if column[1] in ("value", "se", "sampling_se", "seeds")]
    parts.sort(key=lambda column: column[0] not in (TRACE, *COMMON_TRACES.values()))  # traces first
    return pd.concat([joined.rows[IDENTITY + LOSS_COLUMNS], _flat(joined.values[parts])], axis=1)
