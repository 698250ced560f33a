"""The models of the experiments as rows: one an (experiment, group, seed, step), with all numbers that the analysis uses.

Each row is joined from `experiments.json` (see `pretraining.report.contract`), the rows of `results.csv` and the
comparisons with the reference. What is missing is named, with the command that should have made it.

Differences to the reference are by sentences, model minus reference (`comparison_HASH.json`, HASH being that of the reference's
weights). The reference's own is 0; a lookup table's loss is the entropy, so its difference is minus the reference's gap.
"""

import csv
import dataclasses
from pathlib import Path

from pcfg.common.files import InputError, atomic_open
from pretraining.model.checkpoints import is_model_folder, weights_sha256
from pretraining.model.enlarge import TIED_SCALES
from pretraining.report import intervals
from pretraining.report.contract import SIZES, Entry, Experiment, Experiments, Status, read_experiments, read_statuses

ROWS_FILE = "experiments.csv"
COMPARISON = "comparison_*.json"  # how a plan names a record whose name has the hash of the reference's weights
TRACE = "trace"
COMMON_TRACES = tuple(f"trace_{rule}" for rule in TIED_SCALES)  # in the parameters of the largest model, by rule
IDENTITY = ("experiment", "group", "seed", "step", "run", "folder", "kind", "parameters")
LOSS = ("gap", "gap_se", "saturated", "gap_difference", "gap_difference_se", "equal", "not_told_apart")
ACCURACY_PARTS = ("", "_se", "_sampling_se", "_seeds")
EXTRA_COLUMNS = ("seed", "gap_difference", "gap_difference_se", "equal")  # that results.csv gets


def probe_name(experiments: Experiments, task: str) -> str:
    """The column of a task's probe, which is its record's name without `.json`."""
    return f"{experiments.probe}_pcfg_{task}"


def finetune_name(task: str) -> str:
    """The column of a task's fine-tuning."""
    return f"finetune_pcfg_{task}"


def accuracy_names(experiments: Experiments) -> list[str]:
    """The accuracies that the experiments are about, probes first."""
    return [probe_name(experiments, task) for task in experiments.tasks] + list(map(finetune_name, experiments.finetune_tasks))


def accuracy_label(name: str) -> str:
    """What people call an accuracy.

    >>> accuracy_label("probe_pcfg_B"), accuracy_label("finetune_pcfg_B")
    ('probe B', 'fine-tuning B')
    """
    kind, task = name.split("_pcfg_")
    return f"{'fine-tuning' if kind == 'finetune' else kind.replace('_', ' ')} {task}"


def trace_names(experiment: Experiment) -> tuple[str, ...]:
    """The traces that an experiment compares: a model's own, or both of the largest model's parameters across sizes."""
    return COMMON_TRACES if experiment.name == SIZES else (TRACE,)


def loss_label(name: str) -> str:
    """What people call a trace, with its rule of enlarging, or the gap.

    >>> loss_label("gap"), loss_label("trace"), loss_label("trace_head")
    ('gap', 'trace', 'trace (head)')
    """
    return f"trace ({name.removeprefix('trace_')})" if name in COMMON_TRACES else name


def _differences(root: Path, experiments: Experiments, rows: dict[str, dict], records: list[dict]) -> dict[str, tuple]:
    """By folder the paired difference of its gap to the reference's, and its error (nats)."""
    reference = rows.get(experiments.reference, {})
    found = {}
    if is_model_folder(root / experiments.reference):
        digest = weights_sha256(root / experiments.reference)
        for entry in records:
            record = entry["record"]
            if record["measurement"] == "comparison" and record["inputs"]["other"]["sha256"] == digest and "gap_a" in record:
                means = record["difference"]["sentences"]
                found[entry["model"]] = means["mean"], means["standard_error"]
        found[experiments.reference] = 0.0, 0.0
    if reference.get("gap_sentences") is not None:
        tables = [folder for folder, row in rows.items() if row["kind"] != "transformer"]
        found |= dict.fromkeys(tables, (-reference["gap_sentences"], reference.get("gap_sentences_se")))
    return found


def _in_common(entry: Entry, rows: dict[str, dict], largest: int, where: str) -> dict:
    """The traces of one model in the parameters of the largest one, which has `largest` of them.

    Raises:
        InputError: a folder of `common` is of another rule, shape or model.
    """
    cells, own = {}, rows[entry.folder]
    for rule in TIED_SCALES:
        if entry.common:
            row = rows.get(entry.common.get(rule))
            if row is None:
                continue
            same = row.get("enlarged_rule") == rule and row.get("parameters") == largest
            if not same or row.get("enlarged_from_parameters") != own.get("parameters"):
                raise InputError(
                    f"{where}, group {entry.group!r}: {entry.common[rule]} is not {entry.folder} enlarged with --tied-scale "
                    f"{rule} to {largest:,} parameters; enlarge it again"
                )
        elif own.get("parameters") == largest:
            row = own
        else:
            continue
        cells |= {f"trace_{rule}": row.get(TRACE), f"trace_{rule}_se": row.get(f"{TRACE}_se")}
    return cells


def _cells(entry: Entry, rows: dict, differences: dict, experiments: Experiments, names: list[str]) -> dict:
    """What is measured of one model that is there."""
    row = rows[entry.folder]
    cells = {"kind": row["kind"], "parameters": row.get("parameters")}
    gap, error = row.get("gap_sentences"), row.get("gap_sentences_se")
    if gap is not None:
        cells |= {"gap": gap, "gap_se": error, "saturated": intervals.is_saturated(gap, error, experiments.saturated)}
    if entry.folder in differences:
        difference, error = differences[entry.folder]
        cells |= {"gap_difference": difference, "gap_difference_se": error}
        cells["equal"] = intervals.is_equal(difference, error, experiments.margin)
        cells["not_told_apart"] = not intervals.told_apart(difference, error)
    cells |= {TRACE: row.get(TRACE), f"{TRACE}_se": row.get(f"{TRACE}_se")}
    return cells | {name + part: row.get(name + part) for name in names for part in ACCURACY_PARTS}


def why_missing(path: str, experiments: Experiments, statuses: dict[str, Status]) -> str:
    """Which command should have made `path`, and what became of it."""
    reasons = []
    for command in experiments.makers(path):
        status = statuses.get(command.name)
        if status is None:
            reasons.append(f"`{command.name}` has not run")
        elif status.state == "failed":
            code = "" if status.exit_code is None else f" with exit code {status.exit_code}"
            reasons.append(f"`{command.name}` failed{code}" + (f", see {status.log}" if status.log else ""))
        else:
            made = {"done": " is done, but has not made it", "blocked": " is blocked", "not due": " is not due"}[status.state]
            reasons.append(f"`{command.name}`{made}" + (f" ({status.why})" if status.why else ""))
    return "; ".join(reasons) or "no command of the plan makes it"


@dataclasses.dataclass
class _Joined:
    """What the joining of one tree needs at every turn."""

    experiments: Experiments
    statuses: dict[str, Status]
    rows: dict[str, dict]

    def missing(self, entry: Entry, experiment: Experiment, row: dict) -> list[str]:
        """What of one model is not there, and why: texts, one a reason."""
        if entry.folder not in self.rows:
            return [f"missing; {why_missing(entry.folder, self.experiments, self.statuses)}"]
        wanted, is_table = {}, row["kind"] != "transformer"  # by label: column, file
        if not is_table:
            wanted = {"gap": ("gap", f"{entry.folder}/loss.json")}
            wanted["comparison with the reference"] = ("gap_difference", f"{entry.folder}/{COMPARISON}")
            for name in trace_names(experiment):
                folder = entry.common.get(name.removeprefix("trace_"), entry.folder)
                wanted[loss_label(name)] = (name, f"{folder}/hessian.json")
        for name in accuracy_names(self.experiments):
            file = f"{entry.folder}/{name}.json"
            # Fine-tuning is expected only where a command says that it makes it.
            if not name.startswith("finetune") or self.experiments.is_named(file):
                wanted[accuracy_label(name)] = (name, file)
        reasons = {}
        for label, (column, file) in wanted.items():
            if row.get(column) is None:
                reasons.setdefault(why_missing(file, self.experiments, self.statuses), []).append(f"no {label}")
        return [f"{', '.join(labels)}; {reason}" for reason, labels in reasons.items()]


def runs_of(experiment: Experiment) -> dict[tuple[str, int | None], str]:
    """By (group, seed) the name of the run; groups that share a model are one: what starts at it is not independent of it."""
    names, owners = {}, {}
    for entry in experiment.entries:
        key = entry.group, entry.seed
        name = names.setdefault(key, entry.group if entry.seed is None else f"{entry.group} seed {entry.seed}")
        first = owners.setdefault(entry.folder, name)
        names = {other: first if now == name else now for other, now in names.items()}
        owners = {folder: first if now == name else now for folder, now in owners.items()}
    return names


def experiment_rows(
    folder, experiments: Experiments, statuses: dict[str, Status], rows: list[dict], records: list[dict]
) -> list[dict]:
    """One dict an entry of the experiments, in their order.

    Args:
        folder: of `experiments.json`.
        rows, records: what `pretraining.report.rows.collect` found there.

    Returns:
        Dicts with `IDENTITY`, `LOSS`, the traces and accuracies with their errors, as columns of `experiments.csv` (None or no
        key: not measured), and `missing`: a list of texts.

    Raises:
        InputError: an enlarged model that is not the one it is said to be.
    """
    by_folder = {row["model"]: row for row in rows}
    joined = _Joined(experiments, statuses, by_folder)
    differences, names = _differences(Path(folder), experiments, by_folder, records), accuracy_names(experiments)
    found = []
    for experiment in experiments.experiments:
        there = [entry for entry in experiment.entries if entry.folder in by_folder]
        # Beside what is there, what the enlarged ones were enlarged to: the largest model itself may be missing.
        sized = [*(entry.folder for entry in there), *(common for entry in there for common in entry.common.values())]
        largest = max((by_folder[name].get("parameters") or 0 for name in sized if name in by_folder), default=0)
        runs = runs_of(experiment)
        for entry in experiment.entries:
            row = {"experiment": experiment.name, "group": entry.group, "seed": entry.seed, "step": entry.step}
            row |= {"run": runs[entry.group, entry.seed], "folder": entry.folder}
            if entry.folder in by_folder:
                row |= _cells(entry, by_folder, differences, experiments, names)
                if experiment.name == SIZES:
                    row |= _in_common(entry, by_folder, largest, f"experiment {experiment.name}")
            row["missing"] = joined.missing(entry, experiment, row)
            found.append(row)
    return found


def read_experiment_rows(folder, rows: list[dict], records: list[dict]) -> tuple[Experiments, dict, list[dict]] | None:
    """The experiments of `folder`, how their commands ended, and their rows; None where it has no `experiments.json`."""
    experiments = read_experiments(folder)
    if experiments is None:
        return None
    statuses = read_statuses(folder)
    return experiments, statuses, experiment_rows(folder, experiments, statuses, rows, records)


def add_to_results(rows: list[dict], of_experiments: list[dict]) -> None:
    """Put `EXTRA_COLUMNS` into the rows of `results.csv` whose models are in an experiment."""
    by_folder = {row["folder"]: row for row in of_experiments}
    for row in rows:
        if found := by_folder.get(row["model"]):
            row |= {column: cell(found.get(column)) for column in EXTRA_COLUMNS}


def cell(value):
    """A value in a CSV file: booleans as yes and no, nothing for what is missing."""
    return "" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def columns(experiments: Experiments) -> list[str]:
    """The columns of `experiments.csv`."""
    traces = [name + part for name in (TRACE, *COMMON_TRACES) for part in ("", "_se")]
    return [*IDENTITY, *LOSS, *traces, *(name + part for name in accuracy_names(experiments) for part in ACCURACY_PARTS)]


def write_rows(path, experiments: Experiments, rows: list[dict]) -> None:
    """Write `experiments.csv`: full precision; a missing measurement is empty."""
    with atomic_open(path) as file:
        writer = csv.DictWriter(file, columns(experiments), restval="", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
