"""What all files of the project have in common: atomic writing, hashes, provenance and keyed random numbers.

The rules (README, section Files): whatever is written is complete or absent; a rerun skips what is complete and proves it
by a checksum; random numbers are a function of (seed, purpose, index) and of nothing else.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

import numpy as np

# What the operating system says of a place where nothing, or nothing as large, can be written.
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EFBIG)


class InputError(Exception):
    """What the user gave can't be used. The message names file, line or flag, the value, and what to do.

    `pcfg.common.cli.run_main` prints it without a traceback and exits with code 2.
    """


def _temporary(path: Path) -> Path:
    """The name under which `path` is written: always the same one, so that a rerun replaces what a kill left."""
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path):
    """Turn the operating system's refusal to write `path` into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; free some space and run the same command again") from error
        if error.errno in UNWRITABLE:
            raise InputError(f"{path}: can't be written ({error.strerror}); choose another place") from error
        raise


def free_bytes(path) -> int:
    """Bytes free on the disk that `path`, which need not exist yet, is on."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def check_space(path, size: float) -> None:
    """Raise an `InputError` if the disk of `path` has less than `size` bytes free."""
    free = free_bytes(path)
    if size > free:
        raise InputError(
            f"{path}: {size / 1e9:.3g} GB to write, but the disk has {free / 1e9:.3g} GB free; "
            "free some space, choose another place, or make fewer sentences"
        )


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it is synced and renamed, on an exception removed.

    For libraries that want a file name (h5py). `path` is complete or absent at any moment.
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_open(path, mode="w"):
    """Yield a file object ("w": UTF-8 text, "wb": bytes); `path` appears, complete, when the block ends."""
    with atomic_path(path) as temporary:
        options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode, **options) as file:
            yield file


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder; its files are synced and it is renamed to `path`, which it replaces, at the end."""
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256(path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path) -> dict:
    """What a record keeps of an input file: its name and its hash, not the folder it happened to lie in."""
    return {"name": Path(path).name, "sha256": sha256(path)}


class HashedFile:
    """A binary file that is written once from its beginning to its end, and is never read again for its SHA-256.

    Args:
        file: a file object, open for writing bytes.
    """

    def __init__(self, file):
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, block) -> None:
        """Write bytes, or what has their buffer; hashing and writing let other threads run."""
        self._digest.update(block)
        self._file.write(block)
        self._size += len(block)

    def facts(self) -> dict:
        """Size and SHA-256 of what was written, as `Manifest.add` takes them."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}


def write_json(path, value) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has neither."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_open(path) as file:
        file.write(text)


def read_json(path) -> dict:
    """The object in a JSON file; every JSON file of the project is one.

    Raises:
        InputError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); delete it and make it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object, but {type(value).__name__}; delete it and make it again")
    return value


def keyed_rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The random generator of (seed, purpose, index): the same key gives the same numbers everywhere.

    A purpose always takes the same number of indices: without one it would share the stream of index 0.

    >>> bool(keyed_rng(0, "training", 3).integers(100) == keyed_rng(0, "training", 3).integers(100))
    True
    >>> bool(keyed_rng(0, "training", 3).random() == keyed_rng(0, "test", 3).random())
    False
    """
    purpose_key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, purpose_key, *index]))


def versions(*packages: str) -> dict:
    """Versions of Python and of the named packages, for the record of what made a file."""
    # It takes longer to import than the rest of this module together.
    import importlib.metadata

    found = {"python": platform.python_version()}
    for package in packages:
        found[package] = importlib.metadata.version(package)
    return found


class Manifest:
    """The record beside a set of files: what they were made from, and each file's size and SHA-256.

    Args:
        path: the manifest's JSON file.
        made_from: everything that decides the bytes of the files (hashes of inputs, seed, arguments). The number of files
            does not belong here: a set may be extended later.
        overwrite: forget a manifest that was made from something else, instead of refusing.

    Raises:
        InputError: the manifest on disk was made from something else.
    """

    def __init__(self, path, made_from: dict, overwrite: bool = False):
        self.path = Path(path)
        self.content = {"made_from": made_from, "versions": versions("numpy", "numba"), "files": {}}
        if self.path.exists():
            found = read_json(self.path)
            if found.get("made_from") == made_from:
                self.content = found
            elif not overwrite:
                old = found.get("made_from") or {}
                differing = sorted(key for key in old.keys() | made_from.keys() if old.get(key) != made_from.get(key))
                what = ", ".join(f"{key} was {old.get(key)!r}, now {made_from.get(key)!r}" for key in differing)
                raise InputError(
                    f"{self.path}: the files here were made otherwise ({what}); "
                    "give another folder, or --overwrite to replace them"
                )

    @classmethod
    def read(cls, path) -> "Manifest":
        """The manifest at `path`, whatever it was made from."""
        return cls(path, read_json(path).get("made_from"))

    def names(self) -> list:
        return list(self.content["files"])

    def entry(self, name: str) -> dict:
        """What the manifest says of file `name`: size, sha256 and what `add` was given."""
        return self.content["files"][name]

    def is_complete(self, name: str) -> bool:
        """Whether file `name` is listed and on disk with the size and the SHA-256 of its entry."""
        entry, file = self.content["files"].get(name), self.path.parent / name
        return entry is not None and file.is_file() and file.stat().st_size == entry["size"] and sha256(file) == entry["sha256"]

    def add(self, name: str, **facts) -> None:
        """Record the finished file `name`, with further facts (counts), and write the manifest.

        Its size and SHA-256 are read from the file, unless they are among the facts: those of `HashedFile`.
        """
        if "sha256" not in facts:
            file = self.path.parent / name
            facts = {"size": file.stat().st_size, "sha256": sha256(file), **facts}
        self.content["files"][name] = facts
        # By name: files are finished in an order that the workers' luck decides.
        write_json(self.path, {**self.content, "files": dict(sorted(self.content["files"].items()))})


# A sealed JSON file can prove its folder: it lists the SHA-256 of the files next to it, and of itself:
#     {..., "files": {"args.json": hash of all but "files", "model.safetensors": hash of the file, ...}}
# A hash finds damage (a truncation, a flipped byte, files of two folders mixed up), not malice: whoever can write the folder
# can write its hashes.
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
