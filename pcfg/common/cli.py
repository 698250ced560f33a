"""What all command lines of the project have in common: the parser, errors and argument types."""

import argparse
import difflib
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pcfg.common.files import InputError
from pcfg.common.start import INTERRUPTED

SURROGATES = re.compile("[\ud800-\udfff]")  # they stand for bytes that are not UTF-8
# Of the flag --records-path, which all measurements have.
RECORDS_HELP = (
    "folder for the records, where each model has the same relative path as below the models' folder (default: next to the "
    "weights); python -m pretraining.report MODELS --records-path FOLDER reads them there"
)


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
        encoding = sys.getfilesystemencoding()
        for word in words:
            if not word.isascii() and (encoding != "utf-8" or SURROGATES.search(word)):
                advice = "libraries read UTF-8 names only: rename it, or set PYTHONUTF8=1"
                self.error(f"{word!a}: not text in UTF-8, or the locale's encoding ({encoding}) is another; {advice}")
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._as_declared, words[:end]), *words[end:]], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
            hints = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f"; did you mean {hint}?" for hint in hints))
        return options

    def _as_declared(self, word: str) -> str:
        """`word`; if it is a flag or an abbreviation of one, in the spelling of the flag's declaration."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        plain = name[2:].replace("-", "_")
        flags = sorted(flag for flag in self._option_string_actions if flag[2:].replace("-", "_").startswith(plain))
        # The shortest match comes first: the whole flag, or one that the word abbreviates.
        return flags[0][: len(name)] + equals + value if flags else word


class Interrupted(KeyboardInterrupt):
    """A signal has ended the program's work: SIGTERM, or one that the work has noted; `state` is what it has saved."""

    def __init__(self, number: int, state: Path | None = None):
        super().__init__(number)
        self.number = number
        self.state = state


def _terminate(number: int, _: object) -> None:
    raise Interrupted(number)


def run_main(main: Callable[[], None], ranks: bool = False, memory: str = "") -> None:
    """Run `main()`; ends with one line on stderr and exit code 2 for an `InputError`, 130 for Ctrl-C, 143 for SIGTERM.

    `ranks`: it shares its work among the ranks of a launcher. Others refuse several: all would write the same files.
    `memory`: the flag to lower when a GPU has too little memory, which is then an error like an `InputError`.

    A closed stdout (`| head`) ends the program quietly with exit code 141, as SIGPIPE ends others. Characters that the encoding
    of stdout lacks are printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `pcfg.common.start` has another one
    # Of several ranks one may wait in a library for another that has ended; there SIGTERM acts at once.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            if not ranks and os.environ.get("WORLD_SIZE", "1") != "1":
                raise InputError(
                    f"WORLD_SIZE {os.environ['WORLD_SIZE']}: its work is not shared among ranks; start it by python alone"
                )
            main()
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not memory or type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print(f"{program_name()}: error: the GPU has not enough memory; give a smaller {memory}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:
        if not SURROGATES.search(error.object):
            raise
        print(f"{program_name()}: error: {error.object!a}: a name that is not UTF-8; rename it", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        sys.exit(141)


def warn_of_flags(names: Collection[str], measurement: str) -> None:
    """Print a warning that the flags `names` have no effect; nothing without any."""
    if names:
        print(f"warning: no effect on {measurement}: {', '.join('--' + name for name in sorted(names))}")


def program_name() -> str:
    """The program as its user started it: the name of a script, or `python -m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


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


def folder_name(text: str) -> Path:
    """An argparse type: a folder to write, which may exist; an empty name would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name; give the folder a name, . for the working directory")
    return Path(text)


def file_name(text: str) -> str:
    """An argparse type: a file to write."""
    if not Path(text).name or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file; give the file a name")
    return text


class Progress(tqdm):
    """A progress bar that also says once, on stdout, how long the work takes: after its first seconds, if it takes long."""

    FIRST = 5.0  # seconds before the forecast
    LONG = 60.0  # seconds of work that a forecast is worth

    _has_forecast = False

    def update(self, n: float | None = 1) -> bool | None:
        is_shown = super().update(n)
        if is_shown and self.total and not self._has_forecast and (seconds := time.time() - self.start_t) >= self.FIRST:
            self._has_forecast = True
            left = seconds / max(1, self.n - self.initial) * (self.total - self.n)
            if left > self.LONG:
                self.write(f"{self.desc}: about {left / 60:.0f} more minutes for all {self.total:,} {self.unit}s")
        return is_shown


positive_int = number("positive_int", int, lambda value: value >= 1, "1 or more")
non_negative_int = number("non_negative_int", int, lambda value: value >= 0, "0 or more")
non_negative = number("non_negative", float, lambda value: 0.0 <= value < math.inf, "a finite number of 0 or more")
positive = number("positive", float, lambda value: 0.0 < value < math.inf, "a finite number above 0")
finite = number("finite", float, math.isfinite, "a finite number")
probability = number("probability", float, lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
fraction = number("fraction", float, lambda value: 0.0 < value < 1.0, "above 0 and below 1")


def ascending(kind: Callable) -> Callable:
    """An argparse type: a comma-separated list of values of the type `kind`.

    >>> ascending(non_negative_int)("4000,0,1000")
    [0, 1000, 4000]
    """

    def parse(text: str) -> list:
        return sorted({kind(part) for part in text.split(",") if part.strip()})

    parse.__name__ = f"list of {kind.__name__}"
    return parse
