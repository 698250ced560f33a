"""What all command lines of the project have in common: the parser, errors and argument types."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcfg.common.files import InputError


class Parser(argparse.ArgumentParser):
    """The parser of every program: flags may be spelled with `-` or with `_` between words, and help keeps line breaks.

    >>> parser = Parser()
    >>> _ = parser.add_argument("--rule-path")
    >>> parser.parse_args(["--rule_path", "rules.txt"]).rule_path
    'rules.txt'
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._as_declared, words[:end]), *words[end:]], namespace)

    def _as_declared(self, word: str) -> str:
        """`word`; if it is a flag or an abbreviation of one, in the spelling of the flag's declaration."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        plain = name[2:].replace("-", "_")
        flags = sorted(flag for flag in self._option_string_actions if flag[2:].replace("-", "_").startswith(plain))
        # The shortest match comes first: the whole flag, or one that the word abbreviates.
        return flags[0][: len(name)] + equals + value if flags else word


def run_main(main: Callable[[], None]) -> None:
    """Run `main()`; an `InputError` becomes one line on stderr and exit code 2, Ctrl-C becomes exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def boolean(text: str) -> bool:
    """An argparse type: true or false, as Hugging Face's parsers take them (`--fp16`, `--fp16 true`, `--fp16 0`).

    >>> boolean("True"), boolean("0")
    (True, False)
    """
    value = text.lower()
    if value not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value in ("true", "t", "yes", "y", "1")


def number(name: str, convert: type[int] | type[float], accepts: Callable[[float], bool], description: str) -> Callable:
    """An argparse type; argparse shows `name` if the text is no number."""

    def parse(text: str) -> float:
        value = convert(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return value

    parse.__name__ = name
    return parse


positive_int = number("positive_int", int, lambda value: value >= 1, "1 or more")
non_negative_int = number("non_negative_int", int, lambda value: value >= 0, "0 or more")
non_negative = number("non_negative", float, lambda value: 0.0 <= value < math.inf, "a finite number of 0 or more")
finite = number("finite", float, math.isfinite, "a finite number")
probability = number("probability", float, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")


def ascending(kind: Callable) -> Callable:
    """An argparse type: a comma-separated list of values of the type `kind`.

    >>> ascending(non_negative_int)("4000,0,1000")
    [0, 1000, 4000]
    """

    def parse(text: str) -> list:
        return sorted({kind(part) for part in text.split(",") if part.strip()})

    parse.__name__ = f"list of {kind.__name__}"
    return parse
