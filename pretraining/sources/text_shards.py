"""What the sources of text have in common: shards, the manifest of a folder of text, its vocabulary file."""

import contextlib
import dataclasses
from pathlib import Path

from pcfg.artefacts import InputError, Manifest, atomic_open
from pcfg.executors import run_jobs
from pcfg.text import SPLITS, shard_name, shard_paths

MANIFEST = "manifest_pretraining.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of the text files to make."""

    split: str
    number: int
    sentences: int

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def open_manifest(folder: Path, made_from: dict, overwrite: bool) -> Manifest:
    """The manifest of `folder`; text that was made otherwise is removed if `overwrite`, else refused."""
    path = folder / MANIFEST
    present = [shard for split in SPLITS for shard in shard_paths(folder, split)] if folder.is_dir() else []
    if present and not path.exists() and not overwrite:
        raise InputError(
            f"{present[0]}: text that this script has no record of ({MANIFEST} is missing); "
            "give another --save-path, or --overwrite to replace it"
        )
    manifest = Manifest(path, made_from, overwrite)
    if overwrite:
        # Shards beyond the new number would be read with the new ones.
        for shard in present:
            if shard.name not in manifest.names():
                shard.unlink()
    return manifest


def write_vocabulary(manifest: Manifest, folder: Path, content: bytes, overwrite: bool) -> None:
    """Write vocab.txt if it is not complete. It comes first, so that no shard is ever there without a manifest."""
    path = folder / "vocab.txt"
    if manifest.is_complete(path.name):
        return
    if path.exists() and not overwrite and not manifest.names() and path.read_bytes() != content:
        raise InputError(f"{path}: another vocabulary is here; give another --save-path, or --overwrite to replace it")
    with atomic_open(path, "wb") as file:
        file.write(content)
    manifest.add(path.name, tokens=len(content.split()))


def complete_names(manifest: Manifest, shards: list[Shard]) -> set[str]:
    """The names of the shards that are there and unchanged; several are read at once."""
    listed = sorted({shard.name for shard in shards} & set(manifest.names()))
    with contextlib.closing(run_jobs(manifest.is_complete, listed, len(listed), "verifying", "threads")) as verified:
        return {name for name, complete in verified if complete}
