"""A JSON file that can prove its folder: it lists the SHA-256 of the files beside it, and of itself.

    {..., "files": {"args.json": hash of all but "files", "model.safetensors": hash of the file, ...}}

A hash finds damage (a truncation, a flipped byte, files of two folders mixed up), not malice: whoever can write the folder
can write its hashes.
"""

import hashlib
import json
from pathlib import Path

from pcfg.artefacts import InputError, read_json, sha256, write_json

FILES = "files"


def _own_hash(content: dict) -> str:
    """SHA-256 of what a sealed file says, "files" left out, whatever its spaces and the order of its keys."""
    rest = {name: value for name, value in content.items() if name != FILES}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, facts: dict) -> None:
    """Write `facts` to `path`, with the hashes of all files that are in its folder now; "files" among `facts` is replaced."""
    facts = json.loads(json.dumps(facts))  # what a reader will hash
    files = {file.name: sha256(file) for file in sorted(path.parent.iterdir()) if file != path}
    write_json(path, {**facts, FILES: {**files, path.name: _own_hash(facts)}})


def read_sealed(path: Path) -> dict:
    """What a sealed file says, proved by its own hash; the files beside it are not looked at.

    Raises:
        InputError: it is missing, damaged, or was never sealed.
    """
    content = read_json(path)
    files = content.get(FILES)
    if not isinstance(files, dict) or files.get(path.name) != _own_hash(content):
        raise InputError(f"{path}: damaged, it isn't what was written (its own SHA-256 in {FILES!r} says so)")
    return content


def check_file(path: Path, sealed: Path, content: dict) -> None:
    """Refuse the file `path` if it isn't the one that was there when `sealed`, whose content is `content`, was written.

    Raises:
        InputError: it is missing, another one, or not listed at all.
    """
    expected = content[FILES].get(path.name)
    if expected is None:
        raise InputError(f"{path}: is not among the files of {sealed}; remove it, or make the folder again")
    if not path.is_file():
        raise InputError(f"{path}: is missing, {sealed} lists it")
    if sha256(path) != expected:
        raise InputError(f"{path}: damaged, its SHA-256 is not the one in {sealed}")
