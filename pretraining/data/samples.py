"""Files of masked samples: HDF5 in the layout of NVIDIA's and academic-budget-bert's BERT data.

`train_shard_{k}.hdf5` and `test_shard_{k}.hdf5` hold five integer datasets, one row per sample:

    input_ids               (n, T)  [CLS] words [SEP] [PAD]..., the masked words replaced
    input_mask              (n, T)  1 at [CLS], words and [SEP], 0 at padding
    segment_ids             (n, T)  all 0: a sample is one segment
    masked_lm_positions     (n, P)  columns of input_ids, ascending, then 0 where a sample has fewer than P masks
    masked_lm_ids           (n, P)  the words at these positions, 0 where there is no mask

The file's attributes say how it was made; `REQUIRED_ATTRIBUTES` are those that a reader needs. Files of other programs have
none of them: the vocabulary that the reader is given takes their place, and next-sentence labels are not read.

Format 2 leaves no byte unchecked: zlib's Adler-32 covers each chunk, HDF5 1.10's checksums cover all structures, and text has a
fixed length, which keeps it in these structures. Files of format 1, and files of other programs, are read as well. Before a
reader hands out a sample, it refuses

- any changed byte, by SHA-256, if the folder's `manifest_samples.json` lists the file, and by these checks in format 2;
- broken structure; missing or mistyped attributes; shapes that disagree;
- ids out of range and every other deviation from this layout (`Samples.check`);
- special tokens in wrong places (`Samples.check_vocabulary`);
- text of variable length among the attributes if no manifest lists the file: HDF5 hangs or crashes on it when it is damaged.
"""

import contextlib
import dataclasses
import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from pcfg.common.files import AnyPath, InputError, Manifest, atomic_open, check_file
from pretraining.data.vocabulary import Vocabulary

SAMPLES_MANIFEST = "manifest_samples.json"  # of generate_samples.py, next to its files
FORMAT_VERSION = 2  # an attribute; format 1 has none
ROWS_PER_CHUNK = 4096  # of the HDF5 datasets: about 100 kB once compressed, and one read serves many batches
DTYPES = {
    "input_ids": np.int32,
    "input_mask": np.int8,
    "segment_ids": np.int8,
    "masked_lm_positions": np.int32,
    "masked_lm_ids": np.int32,
}
REQUIRED_ATTRIBUTES: dict[str, Any] = {
    "vocab_sha256": str,
    "vocab_size": int | np.integer,
    "max_seq_length": int | np.integer,
    "source": str,
    "source_sha256": str,
}
# What h5py raises where the bytes of a file make no sense.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, MemoryError)
# Of attributes that are read. HDF5 2.0 crashes on lists of variable length whose type is damaged; no attribute is one.
ATTRIBUTE_TYPES = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID, h5py.h5t.TypeStringID)


@dataclasses.dataclass
class Samples:
    """Masked samples in memory, with T = max_seq_length tokens and at most P masks per sample."""

    input_ids: np.ndarray  # (n, T) int32
    input_mask: np.ndarray  # (n, T) int8
    segment_ids: np.ndarray  # (n, T) int8
    masked_lm_positions: np.ndarray  # (n, P) int32, 0 where there is no mask (column 0 is [CLS], never masked)
    masked_lm_ids: np.ndarray  # (n, P) int32
    # attributes: how the samples were made: strings, integers, floats and booleans by name
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def check(self, source: object) -> None:
        """Check attributes, shapes and values against the layout that the module describes; `source` is for messages."""
        _check_attributes(self.attributes, source)
        _check_shapes({name: getattr(self, name).shape for name in DTYPES}, self.attributes, source)
        for name, dtype in DTYPES.items():
            if getattr(self, name).dtype != dtype:
                _refuse(source, f"{name} is of {getattr(self, name).dtype}, not of {dtype.__name__}")
        size = self.attributes["vocab_size"]
        for name in ("input_ids", "masked_lm_ids"):
            low = getattr(self, name).min()
            high = getattr(self, name).max()
            if low < 0 or high >= size:
                _refuse(source, f"{name} has ids from {low} to {high}, the vocabulary has {size} entries")
        for first, ids, input_mask, segments, positions, true_ids in self._blocks():
            tokens = input_mask.sum(axis=1, dtype=np.int32, keepdims=True)  # (rows, 1)
            is_token = np.arange(ids.shape[1], dtype=np.int32) < tokens  # (rows, T); int64 would take twice as long
            is_mask = np.logical_and.accumulate(positions != 0, axis=1)  # (rows, P), those before the first 0
            wrong_mask = input_mask != is_token.view(np.int8)
            is_outside = (positions < 1) | (positions > tokens - 2)
            problems = {
                "segment_ids is not 0: made for next-sentence prediction; the models know one segment": segments != 0,
                "input_mask is not 1 at [CLS], one word or more and [SEP], then 0": wrong_mask | (tokens < 3),
                "input_ids is not [PAD] where input_mask is 0, and nowhere else": (ids != 0) != is_token,
                "no masked position": ~is_mask[:, :1],
                "a masked position is outside the words of the sentence": is_mask & is_outside,
                "masked positions or ids are not 0 after the last mask": ~is_mask & ((positions | true_ids) != 0),
                "masked positions don't ascend": is_mask[:, 1:] & (positions[:, 1:] <= positions[:, :-1]),
                "a masked id is 0, [PAD]": is_mask & (true_ids == 0),
            }
            _refuse_first(problems, first, source)

    def check_vocabulary(self, vocabulary: Vocabulary, source: object) -> None:
        """Check that samples which `check` accepts were made with `vocabulary` and have its special tokens in their places.

        [UNK] may be anywhere: it is a word of samples that other programs made. The replacement of a masked word is free.
        """
        check_same_vocabulary(self.attributes, vocabulary, source)
        is_special = np.zeros(vocabulary.size, dtype=np.bool_)
        is_special[[vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]] = True
        for first, ids, input_mask, _, positions, true_ids in self._blocks():
            rows = np.arange(len(ids))
            last = input_mask.sum(axis=1, dtype=np.int32) - 1
            is_wrong = is_special[ids]  # (rows, T)
            is_wrong[rows, last] = False
            is_wrong[rows[:, None], positions] = False  # column 0, [CLS], where there is no mask
            is_wrong[:, 0] = False
            wrong_end = (ids[:, 0] != vocabulary.cls_id) | (ids[rows, last] != vocabulary.sep_id)
            problems = {
                "input_ids doesn't begin with [CLS] and end with [SEP]": wrong_end[:, None],
                "a special token stands where a word should, and is not masked": is_wrong,
                "a masked id is a special token": is_special[true_ids],
            }
            _refuse_first(problems, first, source)

    def _blocks(self) -> Iterator[tuple]:
        """Blocks that fit into the caches: the number of the first sample, and the arrays in the order of `DTYPES`."""
        for first in range(0, len(self), ROWS_PER_CHUNK):
            yield first, *(getattr(self, name)[first : first + ROWS_PER_CHUNK] for name in DTYPES)


def _refuse_first(problems: dict[str, np.ndarray], first: int, source: object) -> None:
    """Refuse the first sample of a block that has one of the problems, (rows, any) bool by description."""
    if rows := {problem: int(wrong.any(axis=1).argmax()) for problem, wrong in problems.items() if wrong.any()}:
        problem = min(rows, key=rows.__getitem__)
        _refuse(source, f"sample {first + rows[problem]}: {problem}")


def _refuse(source: object, problem: str) -> NoReturn:
    raise InputError(f"{source}: {problem}; make the samples again with generate_samples.py")


def check_same_vocabulary(attributes: dict[str, Any], vocabulary: Vocabulary, source: object) -> None:
    """Check that samples with these attributes were made with `vocabulary`."""
    if (attributes["vocab_sha256"], attributes["vocab_size"]) != (vocabulary.sha256, vocabulary.size):
        raise InputError(
            f"{source}: made with another vocabulary (hash {attributes['vocab_sha256'][:12]}) than the tokenizer's "
            f"({vocabulary.size} entries, hash {vocabulary.sha256[:12]}); give --tokenizer_name the one of the samples"
        )


def _check_attributes(attributes: dict[str, Any], source: object) -> None:
    for name, kind in REQUIRED_ATTRIBUTES.items():
        if name not in attributes:
            _refuse(source, f"attribute {name} is missing")
        if not isinstance(attributes[name], kind):
            _refuse(source, f"attribute {name} is {attributes[name]!r}, of the wrong type")


def _check_shapes(shapes: dict[str, tuple], attributes: dict[str, Any], source: object) -> None:
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1] == 0:
            _refuse(source, f"{name} has shape {shape}, not two dimensions")
    rows, width = shapes["input_ids"]
    if rows == 0:
        _refuse(source, "no samples")
    if width != attributes["max_seq_length"]:
        _refuse(source, f"input_ids has {width} columns, the attribute max_seq_length is {attributes['max_seq_length']}")
    for name, shape in shapes.items():
        expected = (rows, shapes["masked_lm_positions" if name.startswith("masked_lm") else "input_ids"][1])
        if shape != expected:
            _refuse(source, f"{name} has shape {shape}, expected {expected}")


def write_samples(path: AnyPath, blocks: Iterable[Samples]) -> None:
    """Write samples to an HDF5 file, atomically; the same samples give the same bytes, however they are cut into blocks.

    The file's attributes are those of the first block. Each block but the last has a multiple of `ROWS_PER_CHUNK` rows.
    """
    rows = 0
    # In memory (some 20 MB per million samples): h5py reports a full disk as a RuntimeError without a cause.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        for samples in blocks:
            if rows % ROWS_PER_CHUNK:
                raise ValueError(f"{rows} rows before the last block are no multiple of {ROWS_PER_CHUNK}")
            samples.check(f"{path}, from row {rows} on" if rows else path)
            datasets = {name: file[name] for name in DTYPES} if rows else _create_datasets(file, samples)
            for start, *parts in samples._blocks():
                for (name, dataset), part in zip(datasets.items(), parts, strict=True):
                    dataset.resize(rows + start + len(part), axis=0)
                    if name != "segment_ids":  # 0 is HDF5's value for chunks that were never written
                        dataset.id.write_direct_chunk((rows + start, 0), _compressed(part, dataset))
            rows += len(samples)
    if not rows:
        raise InputError(f"{path}: no samples")
    with atomic_open(path, "wb") as target:
        target.write(buffer.getbuffer())


def _create_datasets(file: h5py.File, samples: Samples) -> dict[str, h5py.Dataset]:
    """Create the datasets, empty, and the attributes of a file that begins with `samples`."""
    for name, value in sorted({**samples.attributes, "format_version": FORMAT_VERSION}.items()):
        # Text of a fixed length lies in checksummed structures, text of variable length does not.
        file.attrs[name] = np.bytes_(value, "utf-8") if isinstance(value, str) else value
    # The smallest integers that hold the ids: less to compress.
    id_type = np.min_scalar_type(int(samples.attributes["vocab_size"]) - 1)
    position_type = np.min_scalar_type(samples.input_ids.shape[1] - 1)
    dtypes = {"input_ids": id_type, "masked_lm_positions": position_type, "masked_lm_ids": id_type}
    datasets = {}
    for name in DTYPES:
        width = getattr(samples, name).shape[1]
        datasets[name] = file.create_dataset(
            name,
            shape=(0, width),
            maxshape=(None, width),
            dtype=dtypes.get(name, DTYPES[name]),
            chunks=(min(ROWS_PER_CHUNK, len(samples)), width),
            compression="gzip",
            shuffle=True,
            track_times=False,  # the bytes are a function of the samples alone
        )
    return datasets


def _compressed(array: np.ndarray, dataset: h5py.Dataset) -> bytes:
    """A chunk as HDF5's filters shuffle and gzip store it; rows that `array` lacks are 0.

    Looking for runs only, which HDF5 has no option for, writes a shard a third faster than its own filters.
    """
    chunk = np.zeros(dataset.chunks, dataset.dtype)
    chunk[: len(array)] = array
    planes = chunk.reshape(-1, 1).view(np.uint8).T  # (bytes of a number, numbers)
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_RLE)
    return compressor.compress(np.ascontiguousarray(planes).data) + compressor.flush()


def read_samples(path: AnyPath, vocabulary: Vocabulary | None = None) -> Samples:
    """The samples in an HDF5 file; `vocabulary`: theirs, for files of other programs, which do not say it.

    The file is read once: the bytes that are compared with the manifest are those that the samples are taken from.
    """
    with _open(Path(path), vocabulary) as (file, attributes):
        samples = _parse(file, attributes, path)
    samples.check(path)
    return samples


def read_attributes(path: AnyPath, vocabulary: Vocabulary | None = None) -> dict[str, Any]:
    """The attributes of a file of samples, in the time that its hash takes; `vocabulary` as in `read_samples`."""
    with _open(Path(path), vocabulary) as (_, attributes):
        pass
    _check_attributes(attributes, path)
    return attributes


@contextlib.contextmanager
def _open(path: Path, vocabulary: Vocabulary | None) -> Iterator[tuple[h5py.File, dict[str, Any]]]:
    """The HDF5 file of the bytes at `path`, in memory, and its attributes; errors of h5py become an `InputError`."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with generate_samples.py") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); make it again with generate_samples.py") from error
    is_listed = _check_manifest(path, content)
    try:
        with h5py.File.in_memory(content) as file:
            attributes = _attributes(file, path, is_listed)
            if vocabulary is not None and not attributes.keys() & REQUIRED_ATTRIBUTES.keys():
                attributes |= _attributes_of_others(file, path, content, vocabulary)
            del content  # HDF5 has its own copy
            yield file, attributes
    except HDF5_ERRORS as error:
        _refuse(path, f"not a readable HDF5 file ({error})")


def _check_manifest(path: Path, content: bytes) -> bool:
    """Whether the manifest next to a file lists it; other bytes than those that it lists are refused."""
    manifest_path = path.parent / SAMPLES_MANIFEST
    if not manifest_path.exists():
        return False
    manifest = Manifest.read(manifest_path)
    if path.name not in manifest.names():
        return False
    advice = "make it again with generate_samples.py, or move samples that are not of this set to another folder"
    check_file(path, manifest_path, manifest.content, advice, hashlib.sha256(content).hexdigest())
    return True


def _attributes(file: h5py.File, path: Path, is_listed: bool) -> dict[str, Any]:
    """The numbers, booleans and strings among the attributes of a file."""
    attributes = {}
    for name in file.attrs:
        kind = file.attrs.get_id(name).get_type()
        if not isinstance(kind, ATTRIBUTE_TYPES):
            continue
        if not is_listed and isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
            _refuse(path, f"attribute {name} is text of variable length, and no {SAMPLES_MANIFEST} lists the file")
        value = file.attrs[name]
        if isinstance(value, bytes):
            value = value.decode()
        attributes[name] = value.item() if isinstance(value, np.generic) else value
    attributes.pop("format_version", None)
    return attributes


def _attributes_of_others(file: h5py.File, path: Path, content: bytes, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a file of another program does not say, by the vocabulary that its user gives."""
    ids = file.get("input_ids")
    width = ids.shape[1] if isinstance(ids, h5py.Dataset) and len(ids.shape or ()) == 2 else 0
    facts: dict[str, Any] = {"vocab_sha256": vocabulary.sha256, "vocab_size": vocabulary.size, "max_seq_length": width}
    return facts | {"source": path.name, "source_sha256": hashlib.sha256(content).hexdigest()}


def _parse(file: h5py.File, attributes: dict[str, Any], path: AnyPath) -> Samples:
    """The samples of an open file; its shapes are checked before memory is allocated for them."""
    datasets = {name: file.get(name) for name in DTYPES}
    for name, dataset in datasets.items():
        if not isinstance(dataset, h5py.Dataset):
            _refuse(path, f"dataset {name} is missing")
        if dataset.dtype.kind not in "iu":
            _refuse(path, f"dataset {name} is of {dataset.dtype}, not of integers")
    _check_attributes(attributes, path)
    _check_shapes({name: dataset.shape or () for name, dataset in datasets.items()}, attributes, path)
    arrays = {}
    for name, dtype in DTYPES.items():
        stored = datasets[name][()]
        arrays[name] = stored.astype(dtype, copy=False)
        if stored.dtype != dtype and not np.array_equal(arrays[name], stored):
            _refuse(path, f"dataset {name} has values beyond {dtype.__name__}")
    return Samples(**arrays, attributes=attributes)


def sample_name(split: str, shard: int) -> str:
    """File name of a shard of samples.

    >>> sample_name("train", 3)
    'train_shard_3.hdf5'
    """
    return f"{split}_shard_{shard}.hdf5"


def sample_paths(folder: AnyPath, split: str) -> list[Path]:
    """The files of samples of a split, "train" or "test", in a folder, by shard number."""
    paths = [path for path in Path(folder).glob(f"{split}_shard_*.hdf5") if _SHARD.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (shard_number(path), path))


_SHARD = re.compile(r"\w+_shard_(\d+)\.hdf5")


def shard_number(path: Path) -> int:
    """The number k in a name that `sample_name` gives."""
    return int(_SHARD.sub(r"\1", path.name))
