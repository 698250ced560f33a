"""A study: what is trained, measured and compared, as `study.json` next to the results has it.

It is the resolved form of the TOML files that pretraining/README.md, "Studies", describes: nothing in it depends on another
file. Flags are those of the scripts' command lines, with `_`. Several studies may share one folder: groups of one name are the
same models.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import Field

from pcfg.common.files import AnyPath, InputError, read_json, write_json
from pcfg.common.schema import Schema, parse_schema, read_schema, write_schema

# Files of a folder of results; the paths in them are relative to it.
STUDY_FILE = "study.json"  # `Studies`
STATUS_FILE = "status.json"  # `Status` by name of the command
FORMER_FILE = "experiments.json"  # of the former experiments, whose names and settings were fixed
ADVICE = "run `python -m pretraining.experiments` again, which writes it"
Flags = dict[str, Any]  # of a script, by name without `--`: numbers, texts, booleans, lists
Direction = Literal["falls", "rises"]


class Models(Schema):
    """A group at a step: `GROUP@STEP` in the TOML file, where `GROUP` alone means its last step."""

    group: str
    step: int


class Task(Schema):
    """A downstream task with its labelled files, relative to the folder of results."""

    name: str  # in the names of records: curve_NAME_ridge.json; the name of the training file without .csv
    label: str  # the study file's name of it, for tables and plots
    train_file: str
    validation_file: str
    generate: Flags  # of generate_downstream.py; empty for one's own files
    task_name: str | None = None  # of GLUE, whose columns the files have; None for text,label
    is_measured: bool = Field(default=True, exclude=True)  # `study.json` has only those that are


class Choice(Schema):
    """A flag's value that the selection seeds decide; written as "{NAME}" in the flags of groups.

    The rules, where g is the mean gap over the selection seeds, in nats:
        lowest_gap         the value of the smallest g
        largest            the largest value with g <= g of `reference` (default: the smallest g) + `tolerance`
        lowest_accuracy    of the values that `largest` admits, that of the lowest accuracy on `task` with `labels` labels
    """

    name: str
    group: str  # trained once per value
    flag: str
    values: Annotated[tuple[float, ...], MinLen(2)]
    rule: Literal["lowest_gap", "largest", "lowest_accuracy"]
    reference: Models | None = None
    tolerance: Annotated[float, Ge(0)] = 0.0
    task: str | None = None
    labels: int | None = None


class Group(Schema):
    """Models that differ by their seed alone: `models/NAME/seedS/stepT`, cooled ones `stepT-cooled`."""

    name: str
    label: str  # for tables and plots
    flags: Flags  # of run_pretraining.py, all of them but those of seeds and folders
    start: Models | None  # whose models, seed by seed, are the initial weights
    seeds: tuple[int, ...]
    steps: tuple[int, ...]  # that are measured, ascending; counted from the group's own start
    folders: dict[str, str]  # "SEED@STEP" -> model folder, relative to the folder of results

    def total(self, step: int, groups: dict[str, "Group"]) -> int:
        """Steps of training before and in this group."""
        return step + (groups[self.start.group].total(self.start.step, groups) if self.start else 0)

    def root(self, groups: dict[str, "Group"]) -> str:
        """The group from whose initial weights this one comes; models of one root and seed are not independent."""
        return groups[self.start.group].root(groups) if self.start else self.name

    def folder(self, seed: int, step: int, above: str | None = None) -> str:
        """The folder of a model, relative to the folder of results; `above`: the one of all seeds, by default `models/NAME`."""
        cooled = "-cooled" if step and self.flags.get("lr_schedule") == "wsd" else ""
        return f"{above or f'models/{self.name}'}/seed{seed}/step{step:07d}{cooled}"


class Control(Schema):
    """A folder of records that no pre-trained model is in: words, untrained, lookup."""

    name: Literal["words", "untrained", "lookup"]
    folders: tuple[str, ...]  # relative to the folder of results; `untrained`: one per selection seed


class Measurement(Schema):
    """A measurement of one's own: a command with {model} and {record}, and the key of its number in that JSON file."""

    name: str  # the record is {model}/NAME.json
    command: str
    value: str = "value"
    error: str | None = None  # key of its standard error
    unit: str = ""


class Comparison(Schema):
    """Two groups of models, and what the author expects; `claim` is a sentence for the report."""

    name: str
    claim: str
    before: Models
    after: Models
    trace: Literal["trace", "balanced"] = "trace"  # the flatness that the verdict is about
    flatness: Direction | None = None  # expected of it
    accuracy: Direction | None = None
    primary: bool = False
    tasks: tuple[str, ...]  # whose accuracies are compared
    labels: tuple[int, ...]  # label counts


class Criteria(Schema):
    """Thresholds, fixed before the first accuracy is measured."""

    max_gap: Annotated[float, Gt(0)] = 0.02  # nats
    margin: Annotated[float, Gt(0)] = 0.01  # nats
    accuracy_margin: Annotated[float, Gt(0)] = 0.015
    trace_margin: Annotated[float, Gt(0)] = 0.10  # of the mean of `before`


class Candidate(Schema):
    """One value of a choice, over the selection seeds: means and their standard errors."""

    value: float
    gap: float  # nats
    gap_error: float | None
    accuracy: float | None = None
    accuracy_error: float | None = None
    admitted: bool  # by its gap


class Decision(Schema):
    """`choices/NAME.json`: what was decided, and from what."""

    schema_number: Literal[1] = 1
    choice: Choice
    seeds: tuple[int, ...]
    reference_gap: float | None = None  # nats, of the choice's reference
    limit: float | None = None  # nats: gaps up to this are admitted
    candidates: tuple[Candidate, ...]
    chosen: float | None  # one of the values; null if none is admitted: then the groups that need it are not trained


class Study(Schema):
    """One study, resolved: nothing in it depends on another file."""

    name: str  # of its file, without .toml
    title: str
    question: str
    paper: str | None = None  # steps, sizes or algorithms: the table of Liu et al. (2023) that belongs to it
    sha256: str  # of the canonical JSON of the resolved study
    comparisons: tuple[Comparison, ...]


class Registration(Schema):
    """A start of the runner with studies that it had not seen before."""

    time: str  # ISO, UTC
    sha256: dict[str, str]  # by study
    accuracies: int  # accuracies of reported seeds on the disk at that time; 0: the study was fixed beforehand


class Studies(Schema):
    """`study.json`: everything that the report has to know besides the records."""

    schema_number: Literal[1] = 1
    scale: str
    studies: Annotated[tuple[Study, ...], MinLen(1)]
    text: Flags  # of generate_pretraining.py
    samples: Flags  # of generate_samples.py
    tasks: tuple[Task, ...]
    finetuned: tuple[str, ...] = ()  # names of the tasks that are fine-tuned as well
    stacked: bool  # whether the seeds of a group are trained in one process
    readouts: tuple[str, ...]  # solvers of run_lp.py; the first decides, the others are shown
    label_counts: tuple[int, ...]
    groups: dict[str, Group]
    base: Models  # the models whose accuracies decide headroom
    selection: Group  # the base group's models of the selection seeds
    controls: tuple[Control, ...]
    choices: tuple[Choice, ...]
    measurements: tuple[Measurement, ...]
    criteria: Criteria
    registrations: tuple[Registration, ...]
    commands: dict[str, str]  # of every model folder and record, the command that makes it


class Status(Schema):
    """How a command ended, or why it did not run."""

    state: Literal["done", "failed", "blocked", "not due"]
    exit_code: int | None = None
    seconds: Annotated[float, Ge(0)] | None = None
    log: str | None = None
    why: str | None = None


def read_studies(folder: AnyPath) -> Studies | None:
    """`study.json` of a folder of results; None if it does not exist."""
    if (Path(folder) / FORMER_FILE).exists():
        raise InputError(f"{folder}: results of the former reproduce_*.sh ({FORMER_FILE}); give another --out and run again")
    path = Path(folder) / STUDY_FILE
    return read_schema(Studies, path, ADVICE) if path.exists() else None


def write_studies(folder: AnyPath, studies: Studies) -> None:
    """Write `study.json` of a folder of results, atomically."""
    write_schema(Path(folder) / STUDY_FILE, studies)


def read_decision(folder: AnyPath, name: str) -> Decision | None:
    """The decision of a choice; None if it is not made yet."""
    path = Path(folder) / decision_file(name)
    return read_schema(Decision, path, "delete it and run the study again") if path.exists() else None


def decision_file(name: str) -> str:
    """The file with the decision of a choice, in a folder of results."""
    return f"choices/{name}.json"


def read_statuses(folder: AnyPath) -> dict[str, Status]:
    """How the commands ended, by their names; empty where there is no `status.json`."""
    path = Path(folder) / STATUS_FILE
    content = read_json(path) if path.exists() else {}
    return {name: parse_schema(Status, value, f"{path}, command {name!r}", ADVICE) for name, value in content.items()}


def write_statuses(folder: AnyPath, statuses: dict[str, Status]) -> None:
    """Write `status.json` of a folder of results, atomically."""
    write_json(
        Path(folder) / STATUS_FILE,
        {name: status.model_dump(mode="json", exclude_defaults=True) for name, status in statuses.items()},
    )
