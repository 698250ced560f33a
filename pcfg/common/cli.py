"""What all command lines of the project have in common: errors and argument types."""

import argparse
import math
import sys
from pathlib import Path

from pcfg.common.files import InputError


class Parser(argparse.ArgumentParser):
    """The parser of every program: a flag may be spelled with `-` or with `_` between its words, and help keeps line breaks.

    >>> parser = Parser()
    >>> _ = parser.add_argument("--rule-path")
    >>> parser.parse_args(["--rule_path", "rules.txt"]).rule_path
    'rules.txt'
    """

    def __init__(self, *arguments, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(*arguments, formatter_class=formatter_class, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._as_declared, words[:end]), *words[end:]], namespace)

    def _as_declared(self, word: str) -> str:
        """`word`, where it is a flag or the beginning of one, in the spelling that the flag was declared with."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        plain = name[2:].replace("-", "_")
        flags = sorted(flag for flag in self._option_string_actions if flag[2:].replace("-", "_").startswith(plain))
        # The shortest match comes first: the whole flag, or one that the word abbreviates.
        return flags[0][: len(name)] + equals + value if flags else word


def run_main(main) -> None:
    """Run `main()`; an `InputError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def positive_int(text: str) -> int:
    """An argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def boolean(text: str) -> bool:
    """An argparse type: true or false, as Hugging Face's parsers take them (`--fp16`, `--fp16 true`, `--fp16 0`).

    >>> boolean("True"), boolean("0")
    (True, False)
    """
    value = text.lower()
    if value not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value in ("true", "t", "yes", "y", "1")


def non_negative(text: str) -> float:
    """An argparse type: a finite number of 0 or more."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return value


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def probability(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value
