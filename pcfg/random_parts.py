"""What random grammars of every shape are drawn from: ordinary words, and Dirichlet probabilities."""

import re
import shlex
from pathlib import Path

import numpy as np

from pcfg.common.files import InputError
from pcfg.common.text import decoded

# Below this a Dirichlet draw of low concentration is as good as no rule at all; symbols and words must stay in use.
LEAST_PROBABILITY = 1e-6


def read_words(path) -> list[str]:
    """The ordinary words of a vocabulary file, one a line: two or more letters a-z and nothing else.

    So comments, special tokens, pieces (`##ing`), single letters and punctuation are left out.

    Raises:
        InputError: the file is missing or not UTF-8, or has no such line.
    """
    words = [word for line in decoded(Path(path)).split("\n") if re.fullmatch(r"[a-z]{2,}", word := line.strip())]
    if not words:
        raise InputError(f"{path}: no word of two or more letters a-z; give a vocabulary file with one word a line")
    return list(dict.fromkeys(words))


def dirichlet(rng: np.random.Generator, size: int, concentration: float) -> np.ndarray:
    """Probabilities of a symmetric Dirichlet distribution, none below 1e-6; (size,) float64."""
    drawn = np.maximum(rng.dirichlet(np.full(size, concentration)), LEAST_PROBABILITY)
    return drawn / drawn.sum()


def check_concentrations(options, flags: tuple[str, ...]) -> None:
    """Raise an `InputError` unless the options called `flags` are above 0 and finite."""
    for flag in flags:
        if not 0.0 < getattr(options, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be above 0")


def command_line(module: str, options) -> str:
    """The whole command that a header states: `module` with all of its options."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in vars(options).items() if value is not None]
    return f"command: python -m {module} " + shlex.join(str(part) for flag in flags for part in flag)
