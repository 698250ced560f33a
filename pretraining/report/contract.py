"""`experiments.json`: which models belong to which experiment, and what makes them; its writer and its reader.

The runner of the experiments writes it, `pretraining.report.command` reads it. All folders are relative to the folder that
it lies in, and written with `/`.

| field | type | meaning |
| --- | --- | --- |
| `schema` | 1 | this table's number |
| `scale` | text | name of the plan's size, as shown to people |
| `seeds` | list of integers | the seeds of pre-training |
| `tasks` | list of texts | downstream tasks that are probed; task B's records are `probe_pcfg_B.json` |
| `finetune_tasks` | list of texts | those of them that are fine-tuned too: `finetune_pcfg_B.json` |
| `probe` | text, may be missing | how the names of the probes' records begin, `probe` unless said: `probe_lbfgs`, ... |
| `saturated` | number, nats | a model is saturated when the 95% interval of its gap lies at or below this |
| `margin` | number, nats | two losses are equal when the 95% interval of their difference lies inside +- this |
| `reference` | folder | the model that all others are compared with in pairs |
| `experiments` | list | each a `name` (one of `NAMES`), `entries` and, if weights were tried, `choice`: the file of `Choice` |
| `commands` | list | each a `name`, the `command` as typed, and what it `makes`: folders or files |

An entry of an experiment is one model: `group` (what a line of a table or a mark in a plot is called), `seed` and `step` (null
where it has none: a lookup table), `folder`, and `common`: by rule of enlarging the folder of the same model in the parameters
of the largest one (left out for a model that has that shape itself, and where sizes are not compared). The order of groups is
the order in tables; the first group of `algorithms` is the standard one.

Beside it the runner keeps `status.json`: by command its `state` (one of `STATES`) and, where there are any, `exit_code`,
`seconds`, `log` (a file, relative as well) and `why`.
"""

import dataclasses
import functools
import math
from pathlib import Path, PurePosixPath

from pcfg.common.files import InputError, read_json, write_json
from pretraining.model.enlarge import TIED_SCALES

EXPERIMENTS_FILE, STATUS_FILE = "experiments.json", "status.json"
SCHEMA = 1
STEPS, SIZES, ALGORITHMS = NAMES = ("steps", "sizes", "algorithms")
STATES = ("done", "failed", "blocked", "not due")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of an experiment; the fields are those of the module's text."""

    group: str
    seed: int | None
    step: int | None
    folder: str
    common: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Models that are compared with one another."""

    name: str
    entries: tuple[Entry, ...]
    choice: str | None = None

    def groups(self) -> list[str]:
        """The groups, each once, in the order of the file."""
        return list(dict.fromkeys(entry.group for entry in self.entries))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the plan."""

    name: str
    command: str
    makes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiments:
    """The whole file."""

    scale: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    finetune_tasks: tuple[str, ...] = ()
    probe: str = "probe"
    saturated: float
    margin: float
    reference: str
    experiments: tuple[Experiment, ...]
    commands: tuple[Command, ...] = ()

    @functools.cached_property
    def _by_path(self) -> dict[PurePosixPath, list[Command]]:
        """The commands by what they make."""
        found = {}
        for command in self.commands:
            for path in command.makes:
                found.setdefault(PurePosixPath(path), []).append(command)
        return found

    def makers(self, path: str) -> list[Command]:
        """The commands that make `path` or a folder that it lies in; those that name it most exactly."""
        own = PurePosixPath(path)
        return next((self._by_path[parent] for parent in (own, *own.parents) if parent in self._by_path), [])

    def is_named(self, path: str) -> bool:
        """Whether a command says that it makes exactly `path`."""
        return PurePosixPath(path) in self._by_path

    def groups(self) -> list[str]:
        """The groups of all experiments, each once."""
        return list(dict.fromkeys(group for experiment in self.experiments for group in experiment.groups()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """How a command ended, or why it did not run."""

    state: str
    exit_code: int | None = None
    seconds: float | None = None
    log: str | None = None
    why: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the adversarial term that was tried, against the standard model (nats; accuracies as fractions)."""

    weight: float
    gap_increase: float
    gap_increase_se: float | None
    accuracy: float
    accuracy_se: float | None
    standard_accuracy: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How the weight of the adversarial term was chosen.

    Attributes:
        criterion: in words.
        gap_allowed: nats.
        weights: all that were tried.
        chosen: one of them; None where none met the criterion.
    """

    criterion: str
    gap_allowed: float
    weights: tuple[Weight, ...]
    chosen: float | None = None


def _text(value) -> bool:
    return isinstance(value, str) and value != ""


def _integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _not_negative(value) -> bool:
    return _number(value) and value >= 0


def _positive(value) -> bool:
    return _number(value) and value > 0


def _inside(value) -> bool:
    """Whether `value` names something below the folder of the file."""
    return _text(value) and not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


def _or_null(is_right):
    return lambda value: value is None or is_right(value)


def _distinct(is_right, at_least=0):
    """A check of lists without repetitions."""
    return lambda value: isinstance(value, list) and all(map(is_right, value)) and len(set(value)) == len(value) >= at_least


def _objects(value) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


# What each field must be, and how that is said; a field with a default may be missing.
_WANTED = {
    Experiments: {
        "scale": (_text, "a text"),
        "seeds": (_distinct(_integer, 1), "a list of different integers"),
        "tasks": (_distinct(_text, 1), "a list of different texts"),
        "finetune_tasks": (_distinct(_text), "a list of different texts"),
        "probe": (lambda value: _text(value) and value.startswith("probe"), "the beginning of a probe's record, probe..."),
        "saturated": (_positive, "a positive number of nats"),
        "margin": (_positive, "a positive number of nats"),
        "reference": (_inside, "a folder below that of the file"),
        "experiments": (_objects, "a list of objects"),
        "commands": (_objects, "a list of objects"),
    },
    Experiment: {
        "name": (lambda value: value in NAMES, f"one of {', '.join(NAMES)}"),
        "entries": (lambda value: _objects(value) and value, "a list of objects, one at least"),
        "choice": (_or_null(_inside), "a file below the folder of the file"),
    },
    Entry: {
        "group": (_text, "a text"),
        "seed": (_or_null(_integer), "an integer or null"),
        "step": (_or_null(_integer), "an integer or null"),
        "folder": (_inside, "a folder below that of the file"),
        "common": (
            lambda value: isinstance(value, dict) and value.keys() <= set(TIED_SCALES) and all(map(_inside, value.values())),
            f"folders below that of the file by rule ({', '.join(TIED_SCALES)})",
        ),
    },
    Command: {
        "name": (_text, "a text"),
        "command": (_text, "a text"),
        "makes": (_distinct(_inside), "a list of different folders or files below that of the file"),
    },
    Status: {
        "state": (lambda value: value in STATES, f"one of {', '.join(STATES)}"),
        "exit_code": (_or_null(_integer), "an integer or null"),
        "seconds": (_or_null(_not_negative), "a number or null"),
        "log": (_or_null(_inside), "a file below the folder of the file"),
        "why": (_or_null(lambda value: isinstance(value, str)), "a text"),
    },
    Weight: {
        "weight": (_not_negative, "a number, 0 or more"),
        "gap_increase": (_number, "a number of nats"),
        "gap_increase_se": (_or_null(_not_negative), "a number, 0 or more, or null"),
        "accuracy": (_number, "a number"),
        "accuracy_se": (_or_null(_not_negative), "a number, 0 or more, or null"),
        "standard_accuracy": (_number, "a number"),
    },
    Choice: {
        "criterion": (_text, "a text"),
        "gap_allowed": (_not_negative, "a number of nats, 0 or more"),
        "weights": (lambda value: _objects(value) and value, "a list of objects, one at least"),
        "chosen": (_or_null(_number), "a number or null"),
    },
}
_PARTS = {"experiments": Experiment, "entries": Entry, "commands": Command, "weights": Weight}


def _build(kind, value, where: str):
    """A `kind` from the object `value`, its parts with it; lists become tuples.

    Raises:
        InputError: a field is missing, unknown or wrong; names it after `where`.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {value!r}, not an object; make it again")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise InputError(f"{where}: unknown field {unknown[0]!r}; it has {', '.join(fields)}")
    built = {}
    for name, field in fields.items():
        if name not in value:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InputError(f"{where}: has no {name!r}; it needs {_WANTED[kind][name][1]}")
            continue
        is_right, wanted = _WANTED[kind][name]
        if not is_right(value[name]):
            raise InputError(f"{where}: {name!r} is {value[name]!r}, not {wanted}")
        built[name] = tuple(value[name]) if isinstance(value[name], list) else value[name]
        if name in _PARTS:
            parts = enumerate(value[name], 1)
            built[name] = tuple(_build(_PARTS[name], part, f"{where}, {name} number {number}") for number, part in parts)
    return kind(**built)


def _check_no_repetition(names: list, what: str) -> None:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"{what} {repeated[0]!r} is there more than once; name each once")


def _check(experiments: Experiments, where) -> None:
    """What the fields must be to one another."""
    if other := sorted(set(experiments.finetune_tasks) - set(experiments.tasks)):
        raise InputError(f"{where}: 'finetune_tasks' has {other[0]!r}, which 'tasks' has not; add it there")
    _check_no_repetition([experiment.name for experiment in experiments.experiments], f"{where}: experiment")
    _check_no_repetition([command.name for command in experiments.commands], f"{where}: command")
    for experiment in experiments.experiments:
        models = [(entry.group, entry.seed, entry.step) for entry in experiment.entries]
        _check_no_repetition(models, f"{where}, experiment {experiment.name}: (group, seed, step)")
        for entry in experiment.entries:
            if entry.seed is not None and entry.seed not in experiments.seeds:
                raise InputError(
                    f"{where}, experiment {experiment.name}: group {entry.group!r} has seed {entry.seed}, which 'seeds' has "
                    "not; add it there"
                )


def _read(path, kind):
    content = read_json(path)
    if content.pop("schema", None) != SCHEMA:
        raise InputError(f"{path}: 'schema' is not {SCHEMA}; make the file again with this version")
    return _build(kind, content, str(path))


def read_experiments(folder) -> Experiments | None:
    """`experiments.json` of `folder`; None where there is none.

    Raises:
        InputError: it is not JSON, or a field is missing, unknown or wrong.
    """
    path = Path(folder) / EXPERIMENTS_FILE
    if not path.exists():
        return None
    experiments = _read(path, Experiments)
    _check(experiments, path)
    return experiments


def write_experiments(folder, experiments: Experiments) -> None:
    """Write `experiments.json` of `folder`, atomically.

    Raises:
        InputError: what `read_experiments` would refuse; nothing is written.
    """
    _write(Path(folder) / EXPERIMENTS_FILE, experiments, _check)


def read_choice(path) -> Choice:
    """How the adversarial weight was chosen; raises as `read_experiments`, and for a file that is not there."""
    return _read(path, Choice)


def write_choice(path, choice: Choice) -> None:
    """Write the file of `read_choice`; raises as `write_experiments`."""
    _write(path, choice)


def _write(path, value, check=None) -> None:
    content = dataclasses.asdict(value, dict_factory=_without_empty)
    _build(type(value), _as_lists(content), str(path))
    if check is not None:
        check(value, path)
    write_json(path, {"schema": SCHEMA, **content})


def _without_empty(pairs: list[tuple]) -> dict:
    """A dataclass as JSON: an empty `common` and a missing `choice` are left out."""
    return {name: value for name, value in pairs if not (name in ("common", "choice") and not value)}


def _as_lists(value):
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {name: _as_lists(part) for name, part in value.items()}
    return [_as_lists(part) for part in value] if isinstance(value, list | tuple) else value


def read_statuses(folder) -> dict[str, Status]:
    """How the commands ended, by their names; empty where there is no `status.json`.

    Raises:
        InputError: it is not JSON, or a field is missing, unknown or wrong.
    """
    path = Path(folder) / STATUS_FILE
    if not path.exists():
        return {}
    return {name: _build(Status, value, f"{path}, command {name!r}") for name, value in read_json(path).items()}


def write_statuses(folder, statuses: dict[str, Status]) -> None:
    """Write `status.json` of `folder`, atomically; raises as `write_experiments`."""
    path, content = Path(folder) / STATUS_FILE, {}
    for name, status in statuses.items():
        content[name] = {key: value for key, value in dataclasses.asdict(status).items() if value is not None}
        _build(Status, content[name], f"{path}, command {name!r}")
    write_json(path, content)
