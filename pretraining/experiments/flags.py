"""Flags of the scripts in study files, checked by the scripts' own parsers: names, types and choices, before anything runs."""

import argparse
import functools
import importlib
import re
from typing import Any

from pretraining.experiments.study import Flags
from pretraining.experiments.study_file import Table, suggestion

REFERENCE = re.compile(r"\{([\w.-]+)\}")  # to the value of a choice, or {tasks.NAME}: to the training file of a task
# Flags that the plan sets, by script, in addition to --overwrite and --help.
_RECORDS = ("model_path", "compare", "compare_with", "vocabfile")
_TRANSFER = ("model_name_or_path", "train_file", "validation_file", "output_dir")
PLANNED: dict[str, tuple[str, ...]] = {
    "generate_pretraining": ("save_path",),
    "generate_samples": ("dir", "output_dir"),
    "generate_downstream": ("save_path",),
    "run_pretraining": (
        *("seed", "seeds", "max_steps", "save_steps", "branch_steps", "dataset_path", "output_dir", "job_name"),
        *("config", "resume", "local_rank", "load_training_checkpoint", "load_checkpoint_id"),
    ),
    "calculate_loss": _RECORDS,
    "calculate_hessian": (*_RECORDS, "estimator"),
    "run_lp": (*_TRANSFER, "solver", "features", "rule_path", "condprobfile_train", "condprobfile_validation"),
    "run_ft": _TRANSFER,
}


@functools.cache
def actions(script: str, *arguments: str) -> dict[str, argparse.Action]:
    """The flags of a script by name, with `_`; `arguments` are those of its `build_parser`."""
    parser = importlib.import_module(script).build_parser(*arguments)
    # argparse has no public list of the flags of a parser.
    flags = [(option, action) for action in parser._actions for option in action.option_strings if option.startswith("--")]
    return {option[2:].replace("-", "_"): action for option, action in flags}


def _text(value: Any) -> str:
    """A value as a word of a command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _problem(action: argparse.Action, value: Any) -> str | None:
    """Why a flag does not take a value, or None."""
    if isinstance(value, dict):
        return "a flag is no table"
    if action.nargs == 0:
        return None if isinstance(value, bool) else "must be true or false"
    values = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
    for word in map(_text, values):
        convert: Any = action.type or str
        try:
            converted = convert(word)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            return str(error) if isinstance(error, argparse.ArgumentTypeError) else f"must be {convert.__name__}"
        if action.choices is not None and converted not in action.choices:
            return f"must be one of {', '.join(map(str, action.choices))}"
    return None


def take_flags(table: Table, script: str, *arguments: str, references: frozenset[str] = frozenset()) -> Flags:
    """All that is left in a table, as flags of a script; `references`: what a value in braces may name."""
    known = actions(script, *arguments)
    flags = {}
    for given, value in list(table.values.items()):
        name = given.replace("-", "_")
        if name in (*PLANNED[script], "overwrite", "help"):
            raise table.error(f"{given}: a study sets this flag of {script}.py itself; leave it out", given)
        if name not in known:
            hint = suggestion(name, [*known, *table.known])
            hint = hint if "did you mean" in hint else "; see its --help"
            raise table.error(f"{given}: no key, and no flag of {script}.py{hint}", given)
        if isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
            if match[1] not in references:
                raise table.error(f"{given}: {value} names no choice and no task{suggestion(match[1], references)}", given)
        elif problem := _problem(known[name], value):
            raise table.error(f"{given}: {value!r}: {problem} (as --{name} of {script}.py)", given)
        flags[name] = value
        del table.values[given]
    return flags


def flag_words(script: str, flags: Flags, *arguments: str) -> list[str]:
    """The words of a command line with these flags.

    >>> flag_words("generate_downstream", {"task_type": "A", "overwrite": False, "sentence_num": 10})
    ['--task-type', 'A', '--sentence-num', '10']
    """
    words = []
    for name, value in flags.items():
        action = actions(script, *arguments)[name]
        option = next(option for option in action.option_strings if option[2:].replace("-", "_") == name)
        if action.nargs == 0:
            words += [option] if value else []
        elif action.nargs in ("+", "*") and isinstance(value, list):
            words += [option, *map(_text, value)]
        else:
            text = _text(value)
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return words
