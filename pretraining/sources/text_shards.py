"""What the sources of text have in common: flags, shards, and the folder that they are written into."""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pcfg.common.cli import folder_name, number, positive_int
from pcfg.common.executors import end_if_asked, run_jobs
from pcfg.common.files import InputError, Manifest, atomic_open, check_space, free_bytes
from pcfg.common.text import SPLITS, TEXT_MANIFEST, shard_name, shard_paths, write_shard

# The manifest lists all shards and is written anew after each one.
MAX_SHARDS = 100_000
shard_count = number("shard_count", int, lambda value: 0 <= value <= MAX_SHARDS, f"in 0 to {MAX_SHARDS:,}; make larger shards")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One text file."""

    split: str
    number: int
    sentences: int  # 0 where the source does not decide the number

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    def write(self, folder: Path, blocks: Iterable[tuple[bytes | memoryview, int]]) -> dict:
        """Write the shard from parts of its text, each with its number of words; returns the shard's entry in the manifest."""
        words = 0

        def text() -> Iterator[bytes | memoryview]:
            nonlocal words
            for block, block_words in blocks:
                end_if_asked()
                words += block_words
                yield block

        return {**write_shard(folder / self.name, text()), "sentences": self.sentences, "words": words}


def add_folder_arguments(files: argparse._ActionsContainer) -> None:
    """Add --save-path and --overwrite."""
    files.add_argument("--save-path", type=folder_name, required=True, help="folder for the text; created if missing")
    files.add_argument("--overwrite", action="store_true", help="replace text made with other flags; default: refuse")


def add_shard_arguments(sizes: argparse._ActionsContainer, length_limit: int) -> None:
    """Add --length-limit, and the numbers and sizes of shards, which `list_shards` reads."""
    sizes.add_argument("--sentence-num", type=positive_int, default=10**6, help="sentences per training shard; default 1000000")
    sizes.add_argument("--shard-num", type=shard_count, default=200, help="training shards; default 200")
    sizes.add_argument("--test-sentence-num", type=positive_int, default=10_000, help="sentences per test shard; default 10000")
    sizes.add_argument("--test-shard-num", type=shard_count, default=10, help="test shards; default 10")
    limit_help = f"sentences have fewer words than this; default {length_limit}"
    sizes.add_argument("--length-limit", type=positive_int, default=length_limit, help=limit_help)


def list_shards(options: argparse.Namespace) -> list[Shard]:
    """The shards that the flags of `add_shard_arguments` ask for."""
    if options.length_limit < 2:
        raise InputError(f"--length-limit {options.length_limit}: no sentence has fewer words; give 2 or more")
    if options.shard_num + options.test_shard_num == 0:
        raise InputError("--shard-num 0 --test-shard-num 0: nothing to make; ask for at least one shard")
    return number_shards(options, options.sentence_num, options.test_sentence_num)


def number_shards(options: argparse.Namespace, training_sentences: int = 0, test_sentences: int = 0) -> list[Shard]:
    """--shard-num training shards and --test-shard-num test shards."""
    training = [Shard("training", number, training_sentences) for number in range(options.shard_num)]
    return training + [Shard("test", number, test_sentences) for number in range(options.test_shard_num)]


class TextFolder:
    """A folder of shards with their manifest and vocabulary; a rerun of an interrupted command completes it.

    `made_from` is everything that decides the bytes of the shards; `overwrite` replaces text made from something else.
    """

    def __init__(self, folder: Path, made_from: dict, shards: list[Shard], overwrite: bool):
        self.folder = folder
        self.shards = shards
        self.overwrite = overwrite
        present = [path for split in SPLITS for path in shard_paths(folder, split)] if folder.is_dir() else []
        manifest_path = folder / TEXT_MANIFEST
        if present and not manifest_path.exists() and not overwrite:
            raise InputError(
                f"{present[0]}: text that this script has no record of ({TEXT_MANIFEST} is missing); "
                "give another --save-path, or --overwrite to replace it"
            )
        self.manifest = Manifest(manifest_path, made_from, overwrite, products="t*.txt")  # the shards, of both splits
        if overwrite:
            # Shards beyond the new number would be read together with the new ones.
            for path in present:
                if path.name not in self.manifest.names():
                    path.unlink()
        recorded = sorted({shard.name for shard in shards} & set(self.manifest.names()))
        checks = run_jobs(self.manifest.is_complete, recorded, len(recorded), "verifying", "threads")
        with contextlib.closing(checks):
            complete = {name for name, is_complete in checks if is_complete}
        self.missing_shards = [shard for shard in shards if shard.name not in complete]

    def check_disk(self, sentence_bytes: float, sentences: str) -> None:
        """Print numbers and sizes, from the mean bytes of a sentence and its empty line; refuse a disk that is too small."""
        for split in SPLITS:
            numbers = [shard.sentences for shard in self.shards if shard.split == split]
            size = sum(numbers) * sentence_bytes
            print(f"plan: {len(numbers):,} {split} shards, {sum(numbers):,} sentences, {size / 1e9:.3g} GB")
        missing_bytes = sum(shard.sentences for shard in self.missing_shards) * sentence_bytes
        complete = len(self.shards) - len(self.missing_shards)
        print(
            f"plan: {complete:,} shards are complete, {len(self.missing_shards):,} to make, {missing_bytes / 1e9:.3g} GB in "
            f"{self.folder} ({free_bytes(self.folder) / 1e9:.3g} GB free); {sentences}"
        )
        check_space(self.folder, missing_bytes)

    def write_vocabulary(self, content: bytes) -> None:
        """Write vocab.txt if it is not complete. Written before the shards, it ensures that they never lack a manifest."""
        path = self.folder / "vocab.txt"
        if self.manifest.is_complete(path.name):
            return
        is_own = self.overwrite or self.manifest.names() or path.name in self.manifest.forgotten
        if path.exists() and not is_own and path.read_bytes() != content:
            raise InputError(f"{path}: another vocabulary is here; give another --save-path, or --overwrite to replace it")
        with atomic_open(path, "wb") as file:
            file.write(content)
        self.manifest.add(path.name, tokens=len(content.split()))

    def write_shards(self, write: Callable[[Shard], dict], **executor: Any) -> None:
        """Write the missing shards by `write`, which returns a shard's entry in the manifest, with `run_jobs`."""
        start = time.perf_counter()
        size = 0
        with contextlib.closing(run_jobs(write, self.missing_shards, what="text shards", **executor)) as results:
            for shard, entry in results:
                self.manifest.add(shard.name, **entry)
                size += entry["size"]
        number = len(self.missing_shards)
        seconds = time.perf_counter() - start
        rate = f"; {size / 1e9:.3g} GB in {seconds:.3g} s, {size / 1e6 / seconds:.3g} MB/s" if number else ""
        print(f"{self.folder}: {number} shards made, {len(self.shards) - number} skipped as complete{rate}")
