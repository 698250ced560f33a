"""What the sources of text have in common: shards, the manifest of a folder of text, its vocabulary file."""

import argparse
import contextlib
import dataclasses
from pathlib import Path

from pcfg.common.cli import non_negative_int, positive_int
from pcfg.common.executors import run_jobs
from pcfg.common.files import InputError, Manifest, atomic_open, check_space, free_bytes
from pcfg.common.text import SPLITS, TEXT_MANIFEST, shard_name, shard_paths


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of the text files to make."""

    split: str
    number: int
    sentences: int

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def add_shard_arguments(sizes, length_limit: int) -> None:
    """Add the flags of numbers and sizes of shards, of which `list_shards` makes a list, and --length-limit to a group."""
    sizes.add_argument(
        "--sentence-num", type=positive_int, default=1_000_000, help="sentences a training shard; default 1000000"
    )
    sizes.add_argument("--shard-num", type=non_negative_int, default=200, help="training shards; default 200")
    sizes.add_argument("--test-sentence-num", type=positive_int, default=10_000, help="sentences a test shard; default 10000")
    sizes.add_argument("--test-shard-num", type=non_negative_int, default=10, help="test shards; default 10")
    sizes.add_argument(
        "--length-limit",
        type=positive_int,
        default=length_limit,
        help=f"sentences have fewer words than this; default {length_limit}",
    )


def list_shards(options: argparse.Namespace) -> list[Shard]:
    """The shards that the flags of `add_shard_arguments` ask for.

    Raises:
        InputError: none, or no sentence is short enough.
    """
    if options.length_limit < 2:
        raise InputError(f"--length-limit {options.length_limit}: no sentence has fewer words; it must be 2 or more")
    if options.shard_num + options.test_shard_num == 0:
        raise InputError("--shard-num 0 --test-shard-num 0: nothing to make; ask for a shard at least")
    shards = [Shard("training", i, options.sentence_num) for i in range(options.shard_num)]
    return shards + [Shard("test", i, options.test_sentence_num) for i in range(options.test_shard_num)]


def check_disk(folder: Path, wanted: list[Shard], shards: list[Shard], sentence_bytes: float, about: str) -> None:
    """Print the plan, and raise an `InputError` if the disk can't hold the shards that are `wanted`.

    Args:
        shards: all shards, the wanted ones among them.
        sentence_bytes: mean bytes of a sentence, with the empty line after it.
        about: what else the plan says.
    """
    needed = sum(shard.sentences for shard in wanted) * sentence_bytes
    for split in SPLITS:
        numbers = [shard.sentences for shard in shards if shard.split == split]
        total = sum(numbers)
        print(f"plan: {len(numbers):,} {split} shards, {total:,} sentences, {total * sentence_bytes / 1e9:.3g} GB")
    print(
        f"plan: {len(shards) - len(wanted):,} shards are complete, {len(wanted):,} to make, {needed / 1e9:.3g} GB in {folder} "
        f"({free_bytes(folder) / 1e9:.3g} GB free); {about}"
    )
    check_space(folder, needed)


def open_manifest(folder: Path, made_from: dict, overwrite: bool) -> Manifest:
    """The manifest of `folder`; text that was made otherwise is removed if `overwrite`, else refused."""
    path = folder / TEXT_MANIFEST
    present = [shard for split in SPLITS for shard in shard_paths(folder, split)] if folder.is_dir() else []
    if present and not path.exists() and not overwrite:
        raise InputError(
            f"{present[0]}: text that this script has no record of ({TEXT_MANIFEST} is missing); "
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
