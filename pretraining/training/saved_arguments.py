"""`--config`: the arguments of an earlier run, taken from the `args.json` of one of its model folders."""

import argparse
from pathlib import Path

from pcfg.common.cli import Parser
from pcfg.common.files import FILES, InputError, read_json, read_sealed

# These belong to one start of a run, not to the run.
OF_ONE_START = frozenset({"config", "resume", "overwrite", "local_rank"})


def parse_with_config(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line; what it doesn't say is taken from the file of its `--config`, if it has one.

    Args:
        parser: of run_pretraining.py; its defaults are changed.
        arguments: words of the command line; None: those of this process.

    Raises:
        InputError: names the file and the entry that is unknown here or can't be a value of its flag.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    if path is not None:
        for action, value in _saved_values(parser, path):
            action.default, action.required = value, False
    return parser.parse_args(arguments)


def _saved_values(parser: argparse.ArgumentParser, path: str) -> list[tuple[argparse.Action, object]]:
    """Flags of `parser` and the values that the file `path` has for them."""
    content = read_json(path)
    if Path(path).name in content.get(FILES, ()):  # not a copy that somebody has edited
        content = read_sealed(Path(path))
    saved = content.get("arguments")
    if not isinstance(saved, dict):
        raise InputError(f"--config: {path}: has no 'arguments'; give the args.json of a model folder")
    # argparse has no public list of a parser's flags.
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    values = []
    for name, value in saved.items():
        if name not in actions:
            raise InputError(f"--config: {path}: {name!r} is no flag of run_pretraining.py; remove it")
        if name not in OF_ONE_START:
            if not _is_possible(actions[name], value):
                raise InputError(f"--config: {path}: {name!r} can't be {value!r}; correct it, or give --{name}")
            values.append((actions[name], value))
    return values


def _is_possible(action: argparse.Action, value) -> bool:
    """Whether the flag of `action` could have had `value`, a value from JSON: it is what its own text is parsed to."""
    if value is None:
        return action.default is None and not action.required
    if action.nargs == "?":
        return isinstance(value, bool)
    try:
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parsed = (action.type or str)(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)
