"""The files between the runner of experiments and the report, all in one folder, to which their paths are relative.

`experiments.json` (`Experiments`) says which models belong to which experiment and which command makes them; `status.json`
(`Status` by name of the command) how the commands ended; `choice.json` (`Choice`) how the adversarial weight was chosen.
The runner writes them and the report reads them.
"""

import functools
import itertools
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import AfterValidator, Field, model_validator

from pcfg.common.files import InputError, read_json, write_json
from pcfg.common.schema import AnySchema, Schema, parse_schema
from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.same_loss import SameLoss

EXPERIMENTS_FILE = "experiments.json"
STATUS_FILE = "status.json"
SCHEMA = 1
STEPS, SIZES, ALGORITHMS = NAMES = ("steps", "sizes", "algorithms")
# MODELS: the kind of an experiment that nobody planned: models are shown and compared, nothing is claimed of them
MODELS: Literal["models"] = "models"
ADVICE = "correct the file, or run the experiment's reproduce_*.sh again, which writes it"


def _check_inside(path: str) -> str:
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("must be a path below the folder of the file")
    return path


def _check_distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("must not list an entry twice")
    return values


def _check_unique(names: list, kind: str) -> None:
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{kind} {repeated[0]!r} occurs more than once")


Text = Annotated[str, MinLen(1)]
Inside = Annotated[str, AfterValidator(_check_inside)]
Texts = Annotated[tuple[Text, ...], AfterValidator(_check_distinct)]
Error = Annotated[float, Ge(0)]


class Entry(Schema):
    """One model of an experiment."""

    group: Text  # the name of a row of tables and of a marker in plots; the order of groups is that of first entries
    # seed, step: null where the model has none (a lookup table)
    seed: int | None
    step: int | None
    folder: Inside  # of the model
    # common: by rule of enlarging the folder of the same model in the parameters of the largest one; empty for models that have
    # that shape, and where traces of different shapes are not compared
    common: dict[Annotated[str, Field(pattern=f"^({'|'.join(TIED_SCALES)})$")], Inside] = {}


class Experiment(Schema):
    """Models that are compared with each other."""

    name: Text  # unique; of its table and plots
    entries: Annotated[tuple[Entry, ...], MinLen(1)]  # its models. The first group of `algorithms` is the standard one.
    choice: Inside | None = None  # the file of `Choice`, if adversarial weights were tried
    # kind: the rule of comparison, one of `NAMES` or "models"; left out if `name` is the kind
    kind: Literal["steps", "sizes", "algorithms", "models"] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        if self.kind is None and self.name not in (*NAMES, MODELS):
            raise ValueError(f"name {self.name!r} is none of {', '.join(NAMES)}, and there is no kind")
        _check_unique(
            [(entry.group, entry.seed, entry.step) for entry in self.entries], f"experiment {self.name}: (group, seed, step)"
        )
        return self

    @property
    def rule(self) -> str:
        """The kind, whether given or said by the name."""
        return self.kind or self.name

    @property
    def groups(self) -> list[str]:
        """The groups, each once, in order."""
        return list(dict.fromkeys(entry.group for entry in self.entries))

    @property
    def has_common_traces(self) -> bool:
        """Whether traces are compared in the parameters of the largest model."""
        return self.rule == SIZES or any(entry.common for entry in self.entries)


class Command(Schema):
    """One command of a plan."""

    name: Text
    command: Text  # as typed, with `$OUT` for the folder
    makes: Annotated[tuple[Inside, ...], AfterValidator(_check_distinct)] = ()  # folders and files that exist after it


class Experiments(Schema):
    """`experiments.json`."""

    scale: Text  # name of the plan's size
    seeds: Annotated[tuple[int, ...], AfterValidator(_check_distinct)]  # of pre-training
    tasks: Texts  # downstream tasks that are probed; the records of task B are `probe_pcfg_B.json`
    finetune_tasks: Texts = ()  # those of them that are fine-tuned as well: `finetune_pcfg_B.json`
    # probe: beginning of the names of the probes' records: `probe`, `probe_lbfgs`, ...
    probe: Annotated[str, Field(pattern="^probe")] = "probe"
    # saturated, margin: thresholds of the same loss (nats), `max_gap` and `margin` of `SameLoss`
    saturated: Annotated[float, Gt(0)]
    margin: Annotated[float, Gt(0)]
    reference: Inside | None  # folder of the model that all others are compared with; null if no gap is known
    experiments: tuple[Experiment, ...]
    commands: tuple[Command, ...] = ()
    # inferred: whether the file does not exist and the report made this up from the tree; then all accuracies count
    inferred: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Experiments":
        if other := sorted(set(self.finetune_tasks) - set(self.tasks)):
            raise ValueError(f"finetune_tasks has {other[0]!r}, which tasks lacks")
        _check_unique([experiment.name for experiment in self.experiments], "experiment")
        _check_unique([command.name for command in self.commands], "command")
        for entry in itertools.chain.from_iterable(experiment.entries for experiment in self.experiments):
            if entry.seed is not None and entry.seed not in self.seeds:
                raise ValueError(f"group {entry.group!r} has seed {entry.seed}, which seeds lacks")
        return self

    @property
    def criterion(self) -> SameLoss:
        return SameLoss(self.saturated, self.margin)

    @functools.cached_property
    def _by_path(self) -> dict[PurePosixPath, list[Command]]:
        """The commands by what they make."""
        makers: dict[PurePosixPath, list[Command]] = {}
        for command in self.commands:
            for path in command.makes:
                makers.setdefault(PurePosixPath(path), []).append(command)
        return makers

    def makers(self, path: str) -> list[Command]:
        """The commands that make `path` or a folder above it; those that name it most exactly."""
        own = PurePosixPath(path)
        return next((self._by_path[parent] for parent in (own, *own.parents) if parent in self._by_path), [])

    def is_named(self, path: str) -> bool:
        """Whether a command makes exactly `path`."""
        return PurePosixPath(path) in self._by_path

    @property
    def groups(self) -> list[str]:
        """The groups of all experiments, each once."""
        return list(dict.fromkeys(group for experiment in self.experiments for group in experiment.groups))


State = Literal["done", "failed", "blocked", "not due"]


class Status(Schema):
    """How a command ended, or why it did not run."""

    state: State
    exit_code: int | None = None
    seconds: Error | None = None
    log: Inside | None = None
    why: str | None = None


class Weight(Schema):
    """One weight of the adversarial term, compared with the standard model (nats; accuracies as fractions)."""

    weight: Error
    gap_increase: float  # paired difference of the losses; `gap_increase_se` is its standard error over sentences
    gap_increase_se: Error | None
    accuracy: float
    accuracy_se: Error | None
    standard_accuracy: float
    same_loss: bool | None = None  # whether it has the standard model's loss; null in files from before this criterion


class Choice(Schema):
    """`choice.json`: how the weight of the adversarial term was chosen."""

    criterion: Text  # in words
    gap_allowed: Error  # margin of the same loss, nats
    weights: Annotated[tuple[Weight, ...], MinLen(1)]  # all that were tried
    chosen: float | None = None  # one of them; null where none met the criterion


def _read(schema: type[AnySchema], path: Path) -> AnySchema:
    content = read_json(path)
    number = content.pop("schema", None)
    if number != SCHEMA:
        raise InputError(f"{path}: 'schema' is {number!r}, not {SCHEMA}; {ADVICE}")
    return parse_schema(schema, content, path, ADVICE)


def _content(value: Schema) -> dict[str, Any]:
    return value.model_dump(mode="json", exclude_defaults=True)


def read_experiments(folder: Path | str) -> Experiments | None:
    """`experiments.json` of `folder`; None if it does not exist."""
    path = Path(folder) / EXPERIMENTS_FILE
    return _read(Experiments, path) if path.exists() else None


def write_experiments(folder: Path | str, experiments: Experiments) -> None:
    """Write `experiments.json` of `folder`, atomically."""
    write_json(Path(folder) / EXPERIMENTS_FILE, {"schema": SCHEMA, **_content(experiments)})


def read_choice(path: Path | str) -> Choice:
    """How the adversarial weight was chosen."""
    return _read(Choice, Path(path))


def write_choice(path: Path | str, choice: Choice) -> None:
    """Write the file of `read_choice`, atomically."""
    write_json(path, {"schema": SCHEMA, **_content(choice)})


def read_statuses(folder: Path | str) -> dict[str, Status]:
    """How the commands ended, by their names; empty where there is no `status.json`."""
    path = Path(folder) / STATUS_FILE
    content = read_json(path) if path.exists() else {}
    return {name: parse_schema(Status, value, f"{path}, command {name!r}", ADVICE) for name, value in content.items()}


def write_statuses(folder: Path | str, statuses: dict[str, Status]) -> None:
    """Write `status.json` of `folder`, atomically."""
    write_json(Path(folder) / STATUS_FILE, {name: _content(status) for name, status in statuses.items()})
