"""The shards of a dataset, as training reads them: checked, masked, and the next one ahead of time."""

import functools
import threading
import weakref
from pathlib import Path

from pcfg.common.files import InputError, keyed_rng
from pretraining.data.masking import MaskingRule, remask
from pretraining.data.samples import Samples, check_same_vocabulary, read_attributes, read_samples, sample_paths, shard_number
from pretraining.data.vocabulary import Vocabulary

PATIENCE = 10.0  # seconds to wait for a reading that nobody wants any more: a file system that hangs must not hold up the end


class Shards:
    """Shards of one split in the order of their numbers, over and over.

    While shard `index` is in use, a thread reads `index` + 1, checks it and masks it, so that at most two are in memory. A
    single file is read once. `close`, or the end of a `with` block, ends the thread; so does the end of the process.

    Args:
        folder: of the samples.
        split: "train" or "test".
        vocabulary: that the samples must have been made with.
        first: how many shards are used; None: all.
        dynamic: a seed: the masks in the files are replaced by others, drawn by the rule that the file was made with, a
            function of (seed, number of the shard, `index`, row and sentence). None: the masks in the files.

    Attributes:
        paths: the files.
        max_seq_length: tokens of their samples.

    Raises:
        InputError: the folder has no such shards; the first one is damaged, was made with another vocabulary, or doesn't say
            by which rule.
    """

    def __init__(self, folder, split: str, vocabulary: Vocabulary, first: int | None = None, dynamic: int | None = None):
        self.paths = sample_paths(folder, split)[:first]
        if not self.paths:
            raise InputError(f"{folder}: has no {split}_shard_*.hdf5; make them with generate_samples.py")
        self.vocabulary, self._seed = vocabulary, dynamic
        attributes = read_attributes(self.paths[0])
        check_same_vocabulary(attributes, vocabulary, self.paths[0])
        if dynamic is not None:
            MaskingRule.from_attributes(attributes, self.paths[0])
        self.max_seq_length = int(attributes["max_seq_length"])
        self._newest: tuple[tuple, Samples] | None = None
        self._ahead: list[_Reading] = []  # one or none
        weakref.finalize(self, _end, self._ahead)

    def path(self, index: int) -> Path:
        """The file of shard `index`, counted beyond the last one."""
        return self.paths[index % len(self.paths)]

    def read(self, index: int) -> Samples:
        """The samples of `path(index)`; starts reading the ones after them.

        Raises:
            InputError: the file is damaged, was made with another vocabulary, or has not the first one's `max_seq_length`.
        """
        wanted = self._key(index)
        if self._newest is None or self._newest[0] != wanted:
            if self._ahead and self._ahead[0].key == wanted:
                self._ahead[0].join()  # in the list until it has ended: Ctrl-C may come here
                samples = self._ahead.pop().samples()
            else:
                self.close()
                samples = self._loading(index)()
            self._newest = (wanted, samples)
            if self._key(index + 1) != wanted:
                self._ahead.append(_Reading(self._key(index + 1), self._loading(index + 1)))
        return self._newest[1]

    def close(self) -> None:
        """End the reading ahead."""
        _end(self._ahead)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_):
        self.close()

    def _key(self, index: int) -> tuple:
        """What decides the samples of shard `index`."""
        return self.path(index), None if self._seed is None else index

    def _loading(self, index: int):
        """A function that gives the samples of shard `index`; it holds no reference to this object."""
        path, rng, again = self.path(index), None, None
        if self._seed is not None:
            rng = keyed_rng(self._seed, "dynamic masking", shard_number(path), index)
        if self._newest is not None and self._newest[0][0] == path:  # new masks need no file
            again = self._newest[1]
        return functools.partial(_load, path, self.vocabulary, self.max_seq_length, again, rng)


def _load(path: Path, vocabulary: Vocabulary, max_seq_length: int, again: Samples | None, rng) -> Samples:
    """The samples of a file, or `again` if they are there already; with new masks, if there is a generator."""
    samples = again
    if samples is None:
        samples = read_samples(path)
        samples.check_vocabulary(vocabulary, path)
        if samples.attributes["max_seq_length"] != max_seq_length:
            raise InputError(
                f"{path}: its samples have {samples.attributes['max_seq_length']} tokens, those of the first shard "
                f"{max_seq_length}; make all shards of a folder with one --max_seq_length"
            )
    if rng is None:
        return samples
    rule = MaskingRule.from_attributes(samples.attributes, path)
    return remask(samples, rule, vocabulary, rng, in_place=again is None)


class _Reading(threading.Thread):
    """Calls `load` in the background, once; a daemon, so that it can't keep the process alive."""

    def __init__(self, key: tuple, load):
        super().__init__(name=f"reading {key[0].name}", daemon=True)
        self.key, self._load, self._samples, self._error = key, load, None, None
        self.start()

    def run(self) -> None:
        try:
            self._samples = self._load()
        except BaseException as error:  # whatever it is, the thread that asks for the samples gets it
            self._error = error

    def samples(self) -> Samples:
        """What `load` returned, after `join`; what it raised is raised."""
        if self._error is not None:
            raise self._error
        return self._samples


def _end(ahead: list[_Reading]) -> None:
    """Wait for a reading that nobody wants; the interpreter must not go while a thread is inside HDF5."""
    while ahead:
        ahead.pop().join(PATIENCE)
