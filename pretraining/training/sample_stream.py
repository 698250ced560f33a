"""The shards of a dataset, as training reads them: checked, masked, and the next one in advance."""

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from pcfg.common.files import AnyPath, InputError, keyed_rng
from pretraining.data.masking import MaskingRule, remask
from pretraining.data.samples import Samples, check_same_vocabulary, read_attributes, read_samples, sample_paths, shard_number
from pretraining.data.vocabulary import Vocabulary

PATIENCE = 10.0  # seconds to wait for an unneeded reading at the end: a file system may hang


class Shards(contextlib.AbstractContextManager):
    """Shards of one split in the order of their numbers, repeated without end.

    While shard `index` is in use, a thread reads `index` + 1, checks it and masks it: at most two are in memory. A file that
    any stream has in memory is not read again. `close`, or the end of a `with` block, ends the thread; so does the end of the
    process.

    Args:
        vocabulary: of the samples; others are refused.
        first: number of shards used; None: all.
        dynamic: a seed: the masks in the files are replaced by new ones, drawn by the rule stored in the file, a function of
            (seed, number of the shard, `index`, row and sentence). None: the masks in the files.
    """

    def __init__(
        self, folder: AnyPath, split: str, vocabulary: Vocabulary, first: int | None = None, dynamic: int | None = None
    ):
        self.paths = sample_paths(folder, split)[:first]
        if not self.paths:
            raise InputError(f"{folder}: has no {split}_shard_*.hdf5; make them with generate_samples.py")
        self.vocabulary = vocabulary
        attributes = read_attributes(self.paths[0], vocabulary)
        check_same_vocabulary(attributes, vocabulary, self.paths[0])
        if dynamic is not None:
            MaskingRule.from_attributes(attributes, self.paths[0])
        self.max_seq_length = int(attributes["max_seq_length"])
        self._files = _Files(vocabulary, self.max_seq_length)
        self._begin(dynamic)

    def _begin(self, seed: int | None) -> None:
        self._seed = seed
        self._newest: tuple[tuple, Samples] | None = None
        self._ahead: list[_Reading] = []  # one or none
        weakref.finalize(self, _end, self._ahead)

    def of_stream(self, seed: int) -> "Shards":
        """The same shards with the dynamic masks of another seed; these themselves if that changes nothing."""
        if self._seed in (None, seed):
            return self
        other = copy.copy(self)
        other._begin(seed)
        return other

    def path(self, index: int) -> Path:
        """The file of shard `index`, which may be above the number of files."""
        return self.paths[index % len(self.paths)]

    def read(self, index: int, ahead: bool = True) -> Samples:
        """The samples of `path(index)`; `ahead`: starts reading the next shard."""
        key = self._key(index)
        if self._newest is None or self._newest[0] != key:
            if self._ahead and self._ahead[0].key == key:
                self._ahead[0].join()  # in the list until it has ended: Ctrl-C may come here
                samples = self._ahead.pop().samples.result()
            else:
                self.close()
                samples = self._loading(index)()
            self._newest = (key, samples)
        if ahead and not self._ahead and self._key(index + 1) != key:
            self._ahead.append(_Reading(self._key(index + 1), self._loading(index + 1)))
        return self._newest[1]

    def close(self) -> None:
        """End the reading in advance."""
        _end(self._ahead)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key(self, index: int) -> tuple:
        """The identity of the samples of shard `index`."""
        return self.path(index), None if self._seed is None else index

    def _loading(self, index: int) -> Callable[[], Samples]:
        """A function that returns the samples of shard `index`; it holds no reference to this object."""
        return functools.partial(self._files.load, self.path(index), self._seed, index)


class _Files:
    """The files of a folder for all streams of a run: what one of them has in memory is not read again."""

    def __init__(self, vocabulary: Vocabulary, max_seq_length: int):
        self._vocabulary, self._max_seq_length = vocabulary, max_seq_length
        self._in_memory: weakref.WeakValueDictionary[tuple[Path, int | None], Samples] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # threads may ask for one file at a time

    def load(self, path: Path, seed: int | None, index: int) -> Samples:
        """The samples of a file; with new masks, if there is a seed."""
        with self._lock:
            # Of any stream: new masks take the place of any others.
            samples = next((found for (other, _), found in self._in_memory.items() if other == path), None)
            if is_new := samples is None:
                samples = read_samples(path, self._vocabulary)
                samples.check_vocabulary(self._vocabulary, path)
                if samples.attributes["max_seq_length"] != self._max_seq_length:
                    raise InputError(
                        f"{path}: its samples have {samples.attributes['max_seq_length']} tokens, those of the first shard "
                        f"{self._max_seq_length}; make all shards of a folder with one --max_seq_length"
                    )
            if seed is not None:
                rng = keyed_rng(seed, "dynamic masking", shard_number(path), index)
                rule = MaskingRule.from_attributes(samples.attributes, path)
                samples = remask(samples, rule, self._vocabulary, rng, in_place=is_new)
            self._in_memory[path, seed] = samples
            return samples


class _Reading(threading.Thread):
    """Calls `load` in the background, once; a daemon, so that it cannot keep the process alive."""

    def __init__(self, key: tuple, load: Callable[[], Samples]):
        super().__init__(name=f"reading {key[0].name}", daemon=True)
        self.key = key
        self.samples: Future[Samples] = Future()
        self._load = load
        self.start()

    def run(self) -> None:
        try:
            self.samples.set_result(self._load())
        except BaseException as error:  # of any kind: the thread that asks for the samples raises it
            self.samples.set_exception(error)


def _end(ahead: list[_Reading]) -> None:
    """Wait for an unneeded reading: the interpreter must not exit while a thread is inside HDF5."""
    while ahead:
        ahead.pop().join(PATIENCE)
