"""Basics of all files of the project: atomic writing, hashes, manifests and keyed random numbers.

The rules (README, Guarantees): whatever is written is complete or absent; a rerun skips what is complete and proves it by a
checksum; random numbers are a function of (seed, purpose, index) and of nothing else.
"""

import contextlib
import errno
import fnmatch
import hashlib
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

# What the operating system says of a place where nothing, or nothing as large, can be written.
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EFBIG)

AnyPath = str | os.PathLike[str]


class InputError(Exception):
    """The user's input cannot be used. The message names file, line or flag, the value, and what to do.

    `pcfg.common.cli.run_main` prints it without a traceback and exits with code 2.
    """


def _temporary(path: Path) -> Path:
    """The name under which `path` is written: always the same one, so that a rerun replaces what a kill left."""
    return path.with_name(f".{path.name}.tmp")


def _sync(path: Path) -> None:
    """Make the content of a file, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` (through `temporary`) into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f": more than the {_size(temporary):,} bytes written so far are needed" if temporary else ""
            raise InputError(f"{path}: the disk is full{needed}; free some space and run the same command again") from error
        if error.errno in UNWRITABLE:
            raise InputError(f"{path}: can't be written ({error.strerror}); choose another place") from error
        raise


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if there is nothing."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def free_bytes(path: AnyPath) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def check_space(path: AnyPath, size: float) -> None:
    """Raise an `InputError` if the disk of `path` has less than `size` bytes free."""
    free = free_bytes(path)
    if size > free:
        raise InputError(
            f"{path}: {size / 1e9:.3g} GB to write, but the disk has {free / 1e9:.3g} GB free; "
            "free some space, choose another place, or make fewer sentences"
        )


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it is synced and renamed, on an exception removed.

    For libraries that need a file name (h5py). `path` is complete or absent at any moment.
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(path, temporary):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_open(path: AnyPath, mode: str = "w") -> Iterator[IO]:
    """Yield a file object ("w": UTF-8 text, "wb": bytes); `path` appears, complete, when the block ends."""
    with atomic_path(path) as temporary:
        options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode, **options) as file:
            yield file


@contextlib.contextmanager
def atomic_folder(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary folder; its files are synced and it is renamed to `path`, which it replaces, at the end."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with disk_errors(path, temporary):
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_writable(folder: AnyPath, advice: str) -> None:
    """Make a folder, and refuse one in which no file can be written, before hours of work for such a file."""
    probe = Path(folder) / f".probe-{os.getpid()}"
    try:
        with atomic_open(probe, "wb") as file:
            file.write(bytes(1 << 16))
        probe.unlink()
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error


def write_json(path: AnyPath, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has neither."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_open(path) as file:
        file.write(text)


def read_json(path: AnyPath) -> dict:
    """The object in a JSON file; every JSON file of the project holds one."""
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


def available_cores() -> int:
    """Number of cores that this process may use; on systems that do not say (macOS), all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the named packages, for the record of what made a file."""
    # It takes longer to import than the rest of this module together.
    import importlib.metadata

    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def sha256(file: AnyPath | io.BufferedReader) -> str:
    """Hexadecimal SHA-256 of the bytes of a file: a path, or a file that is open for reading bytes."""
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return sha256(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: AnyPath) -> dict[str, str]:
    """The facts of an input file that a record keeps: name and hash, but not the folder in which it happened to be."""
    return {"name": Path(path).name, "sha256": sha256(path)}


# A manifest is a JSON file that lists files of its folder, under "files", by name. An entry is the file's SHA-256, alone or
# with other facts; `Manifest` writes the long form, `write_sealed` the short one and the SHA-256 of its own content:
#     {..., "files": {"training0.txt": {"size": 9, "sha256": "...", "sentences": 2}, "vocab.txt": "...", "args.json": "..."}}
# A hash finds damage (a truncation, a flipped byte, files of two folders mixed up), not malice: whoever can write the folder
# can write its hashes.
FILES = "files"
SIGHT = (0.2, 1.0, 4.0)  # seconds between looks for a file that another machine has made


def check_file(path: Path, manifest: Path, content: dict, advice: str = "make it again", digest: str | None = None) -> None:
    """Refuse a file that is missing, or not the one that its manifest lists: the one checker of the project.

    The file is in the folder of the manifest, or below, and read here unless `digest` is the SHA-256 of its bytes.
    """
    name = path.relative_to(manifest.parent).as_posix()
    if name not in content[FILES]:
        raise InputError(f"{path}: is not among the files of {manifest}; remove it, or {advice}")
    if digest is None and not path.is_file():
        raise InputError(f"{path}: is missing, {manifest} lists it; {advice}")
    entry = content[FILES][name]
    facts = {"sha256": entry} if isinstance(entry, str) else entry
    if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
        raise InputError(f"{manifest}: damaged, it has no SHA-256 of {name}; delete it, and {advice}")
    # The size first, to save the time of hashing.
    damaged = digest is None and facts.get("size") not in (None, path.stat().st_size)
    if damaged or facts["sha256"] != (digest or sha256(path)):
        raise InputError(f"{path}: damaged, its SHA-256 is not the one in {manifest}; {advice}")


class Manifest:
    """The record next to a set of files: what they were made from, and each file's size and SHA-256.

    Args:
        made_from: everything that decides the bytes of the files (hashes of inputs, seed, arguments), without the number of
            files: a set may be extended later. None: whatever the manifest on disk says.
        overwrite: forget a manifest of files that were made from something else, instead of refusing it.
        products: pattern of the names of the files that matter. A manifest that lists none protects nothing: a run that was
            refused or killed before its first product does not bind the next one to its flags.
    """

    def __init__(self, path: AnyPath, made_from: dict | None, overwrite: bool = False, products: str = "*"):
        self.path = Path(path)
        self.products = products
        self.content: dict[str, Any] = {}
        self.forgotten: frozenset[str] = frozenset()  # files of a manifest that is replaced
        if made_from is None or self.path.exists():
            self.content = read_json(self.path)
            if not isinstance(self.content.get(FILES), dict):
                raise InputError(f"{self.path}: damaged, it lists no files; delete it and make the files again")
            if made_from is None or self.content.get("made_from") == made_from:
                return
            self.forgotten = frozenset(self.names())
            if not overwrite and self.has_product():
                old = self.content.get("made_from") or {}
                differing = sorted(key for key in old.keys() | made_from.keys() if old.get(key) != made_from.get(key))
                what = ", ".join(f"{key} was {old.get(key)!r}, now {made_from.get(key)!r}" for key in differing)
                raise InputError(
                    f"{self.path}: the files here were made otherwise ({what}); "
                    "give another folder, or --overwrite to replace them"
                )
        self.content = {"made_from": made_from, "versions": versions("numpy", "numba"), FILES: {}}

    @classmethod
    def read(cls, path: AnyPath) -> "Manifest":
        """The manifest at `path`, whatever its files were made from."""
        return cls(path, None)

    def names(self) -> list[str]:
        return list(self.content[FILES])

    def has_product(self) -> bool:
        return any(fnmatch.fnmatchcase(name, self.products) for name in self.names())

    @contextlib.contextmanager
    def or_nothing(self) -> Iterator[None]:
        """A block that makes the first files: if it is refused before a product, it leaves the folder as it was."""
        folder = self.path.parent
        before = set(folder.rglob("*")) | {path for path in (folder, *folder.parents) if path.exists()}
        try:
            yield
        except InputError:
            if not self.has_product():
                made = {folder, *folder.parents, *folder.rglob("*")} - before
                for path in sorted(filter(Path.exists, made), reverse=True):  # files before their folders
                    path.rmdir() if path.is_dir() else path.unlink()
            raise

    def entry(self, name: str) -> dict[str, Any]:
        """The facts of file `name`: size, sha256 and those given to `add`."""
        return self.content[FILES][name]

    def is_complete(self, name: str) -> bool:
        """Whether file `name` is listed and on disk with the size and the SHA-256 of its entry."""
        try:
            check_file(self.path.parent / name, self.path, self.content)
        except InputError:
            return False
        return True

    def add(self, name: str, **facts: Any) -> None:
        """Record the finished file `name`, with further facts (counts), and write the manifest.

        Its size and SHA-256 are read from the file, unless they are among the facts, as from `pcfg.common.text.write_shard`. A
        file that is not here in its size was made by another machine in a folder of its own.
        """
        file = self.path.parent / name
        for wait in (*SIGHT, None):
            os.listdir(file.parent)  # a network's file system looks again for what another machine has made
            if file.exists() and facts.get("size", file.stat().st_size) == file.stat().st_size:
                break
            if wait is None:
                raise InputError(f"{file}: was made elsewhere and is not here; all machines need the same folder at this path")
            time.sleep(wait)
        if "sha256" not in facts:
            facts = {"size": file.stat().st_size, "sha256": sha256(file), **facts}
        self.content[FILES][name] = facts
        # By name: the order in which files are finished varies from run to run.
        write_json(self.path, {**self.content, FILES: dict(sorted(self.content[FILES].items()))})


def _own_hash(content: dict) -> str:
    """SHA-256 of the content of a sealed file without "files", whatever its spaces and the order of its keys."""
    rest = {name: value for name, value in content.items() if name != FILES}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, facts: dict) -> None:
    """Write `facts` as a manifest of all files that are in the folder of `path` now, and of itself."""
    facts = json.loads(json.dumps(facts))  # as a reader will hash them
    files = {file.name: sha256(file) for file in sorted(path.parent.iterdir()) if file != path}
    write_json(path, {**facts, FILES: {**files, path.name: _own_hash(facts)}})


def read_sealed(path: Path) -> dict:
    """The content of a file of `write_sealed`, proved by its own hash; the other files are not read."""
    content = read_json(path)
    if not isinstance(content.get(FILES), dict) or path.name not in content[FILES]:
        raise InputError(f"{path}: damaged, it does not list itself; make it again")
    check_file(path, path, content, digest=_own_hash(content))
    return content
