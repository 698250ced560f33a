"""Files of masked samples: HDF5 in the layout of NVIDIA's and academic-budget-bert's BERT data.

`train_shard_{k}.hdf5` and `test_shard_{k}.hdf5` hold five integer datasets, one row a sample:

    input_ids               (n, T)  [CLS] words [SEP] [PAD]..., the masked words replaced
    input_mask              (n, T)  1 at [CLS], words and [SEP], 0 at padding
    segment_ids             (n, T)  all 0: a sample is one segment
    masked_lm_positions     (n, P)  columns of input_ids, ascending, then 0 where a sample has fewer than P masks
    masked_lm_ids           (n, P)  the words that stood there, 0 where there is no mask

The file's attributes say how it was made; `REQUIRED_ATTRIBUTES` are what a reader needs to know that it fits.

What a reader finds, before it hands out a sample: if the folder's `manifest_samples.json` lists the file, any changed byte,
by its SHA-256. Of other files: broken structure; a damaged chunk, by zlib's Adler-32; missing or mistyped attributes; shapes
that disagree; ids out of range, and whatever is not laid out as above (`Samples.check`); special tokens out of place
(`Samples.check_vocabulary`). What nothing can tell then: a word that was replaced by another word in a chunk that is
not compressed, a position moved to another word of the sentence there, and an attribute that still makes sense.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from pcfg.common.files import InputError, Manifest, atomic_open, check_file
from pretraining.data.layout import (
    DTYPES,
    INPUT_RANGE,
    MASKED_RANGE,
    PROBLEMS,
    first_problem,
    first_stranger,
    wrong_attribute,
    wrong_shape,
)
from pretraining.data.vocabulary import Vocabulary

SAMPLES_MANIFEST = "manifest_samples.json"  # of generate_samples.py, beside its files
SPLITS = ("train", "test")
ROWS_A_CHUNK = 4096  # of the HDF5 datasets: about 100 kB once compressed, and one read serves many batches


@dataclasses.dataclass
class Samples:
    """Masked samples in memory, with T = max_seq_length tokens and at most P masks a sample.

    Attributes:
        input_ids: (n, T) int32.
        input_mask: (n, T) int8.
        segment_ids: (n, T) int8.
        masked_lm_positions: (n, P) int32, 0 where there is no mask (column 0 is [CLS], never masked).
        masked_lm_ids: (n, P) int32.
        attributes: how the samples were made: strings, integers, floats and booleans by name.
    """

    input_ids: np.ndarray
    input_mask: np.ndarray
    segment_ids: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_ids: np.ndarray
    attributes: dict = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def check(self, source) -> None:
        """Check shapes and values against the layout that the module describes.

        Raises:
            InputError: an attribute is missing or of the wrong type, shapes disagree, ids are out of range, padding is not
                [PAD], or masks stand outside the sentence.
        """
        shapes = {name: getattr(self, name).shape for name in DTYPES}
        problem = wrong_attribute(self.attributes) or wrong_shape(shapes, self.attributes) or self._wrong_type()
        if not problem:
            arrays = (getattr(self, name) for name in DTYPES)
            problem = self._describe(*first_problem(*arrays, int(self.attributes["vocab_size"])))
        _refuse(source, problem)

    def check_vocabulary(self, vocabulary: Vocabulary, source) -> None:
        """Check that samples which `check` accepts were made with `vocabulary` and have its special tokens in their places.

        [UNK] may be anywhere: it is a word of samples that other programs made. What replaces a masked word may be anything.

        Raises:
            InputError: another vocabulary; no [CLS] or [SEP] at an end; [CLS], [SEP] or [MASK] as a word that is not masked
                or as the true word of one that is.
        """
        check_same_vocabulary(self.attributes, vocabulary, source)
        is_special = np.zeros(vocabulary.size, dtype=np.bool_)
        is_special[[vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]] = True
        arrays = (self.input_ids, self.input_mask, self.masked_lm_positions, self.masked_lm_ids)
        _refuse(source, self._describe(*first_stranger(*arrays, is_special, vocabulary.cls_id, vocabulary.sep_id)))

    def _wrong_type(self) -> str | None:
        for name, dtype in DTYPES.items():
            if getattr(self, name).dtype != dtype:
                return f"{name} is of {getattr(self, name).dtype}, not of {dtype.__name__}"
        return None

    def _describe(self, problem: int, row: int) -> str | None:
        """A number of `PROBLEMS` in words, None for 0."""
        if problem in (INPUT_RANGE, MASKED_RANGE):
            ids = self.input_ids if problem == INPUT_RANGE else self.masked_lm_ids
            return PROBLEMS[problem].format(low=ids.min(), high=ids.max(), size=self.attributes["vocab_size"])
        return f"sample {row}: {PROBLEMS[problem]}" if problem else None


def _refuse(source, problem: str | None) -> None:
    """Raise an `InputError` about samples if there is a problem."""
    if problem:
        raise InputError(f"{source}: {problem}; make the samples again with generate_samples.py")


def check_same_vocabulary(attributes: dict, vocabulary: Vocabulary, source) -> None:
    """Check that samples with these attributes were made with `vocabulary`.

    Raises:
        InputError: they were not.
    """
    if (attributes["vocab_sha256"], attributes["vocab_size"]) != (vocabulary.sha256, vocabulary.size):
        raise InputError(
            f"{source}: made with another vocabulary (hash {attributes['vocab_sha256'][:12]}) than the tokenizer's "
            f"({vocabulary.size} entries, hash {vocabulary.sha256[:12]}); give --tokenizer_name the one of the samples"
        )


def write_samples(path, blocks: Iterable[Samples]) -> None:
    """Write samples to an HDF5 file, atomically; the same samples give the same bytes, however they are cut into blocks.

    Args:
        blocks: the samples in order, with the attributes of the first; each but the last has a multiple of
            `ROWS_A_CHUNK` rows.

    Raises:
        InputError: `Samples.check` refuses a block, or the file can't be written.
    """
    chunks: dict[str, list[bytes]] = {name: [] for name in DTYPES}
    rows, first = 0, None
    for samples in blocks:
        if rows % ROWS_A_CHUNK:
            raise ValueError(f"{rows} rows before the last block are no multiple of {ROWS_A_CHUNK}")
        samples.check(f"{path}, from row {rows} on" if rows else path)
        first, rows = first or samples, rows + len(samples)
        step = min(ROWS_A_CHUNK, rows)
        for name, compressed in chunks.items():
            array = getattr(samples, name)
            compressed += [_compressed(array[row : row + step], step) for row in range(0, len(array), step)]
    if first is None:
        raise InputError(f"{path}: no samples")
    with atomic_open(path, "wb") as file:
        file.write(_hdf5(chunks, rows, first).getbuffer())


def _hdf5(chunks: dict[str, list[bytes]], rows: int, first: Samples) -> io.BytesIO:
    """An HDF5 file of compressed `chunks`; types, columns and attributes are those of `first`."""
    # made in memory (some 20 MB a million samples): h5py reports a full disk as a RuntimeError that names no cause
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, compressed in chunks.items():
            array, step = getattr(first, name), min(ROWS_A_CHUNK, rows)
            dataset = file.create_dataset(
                name,
                shape=(rows, array.shape[1]),
                dtype=array.dtype,
                chunks=(step, array.shape[1]),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
                track_times=False,  # the bytes are a function of the samples alone
            )
            for number, chunk in enumerate(compressed):
                dataset.id.write_direct_chunk((number * step, 0), chunk)
        for name in sorted(first.attributes):
            file.attrs[name] = first.attributes[name]
    return buffer


def _compressed(array: np.ndarray, rows: int) -> bytes:
    """A chunk of `rows` rows of a dataset as HDF5's filters shuffle and gzip store it; rows that `array` lacks are 0.

    Shuffle puts the lowest bytes of all numbers first, then the next ones, and so on. Of these planes only the lower ones
    have other bytes than 0 (an id takes one or two of its four bytes, segments take none); deflate works on those alone.
    """
    size = array.itemsize
    planes = (int(array.max()).bit_length() + 7) // 8
    chunk = np.zeros((planes, rows * array.shape[1]), dtype=np.uint8)
    chunk[:, : array.size] = array.reshape(-1, 1).view(np.uint8)[:, :planes].T  # little-endian
    return _zlib(chunk.tobytes(), (size - planes) * chunk.shape[1])


def _zlib(content: bytes, zeros: int) -> bytes:
    """A zlib stream (RFC 1950) of `content` followed by `zeros` zero bytes, in the time that `content` alone takes.

    Runs (of padding) are all that is looked for, since that is fast and makes files of ids smaller than level 1 does.
    """
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_RLE)
    stream = compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = zlib.adler32(content)
    low, high = checksum & 0xFFFF, checksum >> 16
    checksum = (high + zeros * low) % 65521 << 16 | low  # Adler-32 of a zero byte adds `low` to `high`
    return stream + _deflated_zeros(zeros) + checksum.to_bytes(4, "big")


@functools.lru_cache(maxsize=16)
def _deflated_zeros(number: int) -> bytes:
    """The last blocks of a deflate stream (RFC 1951): zero bytes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(bytes(number)) + compressor.flush()


# What h5py raises where the bytes of a file make no sense.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, MemoryError)


def read_samples(path) -> Samples:
    """The samples in an HDF5 file.

    The file is read once: the bytes that are compared with the manifest are those that the samples are taken from.

    Raises:
        InputError: no such file, not the one that the folder's manifest lists, not HDF5 or damaged, a dataset missing or not
            of integers that fit, or `Samples.check` refuses it.
    """
    with _open(path) as file:
        samples = _parse(file, path)
    samples.check(path)
    return samples


def read_attributes(path) -> dict:
    """The attributes of a file of samples, in the time that its hash takes.

    Raises:
        InputError: as `read_samples`, as far as it shows without the samples.
    """
    with _open(path) as file:
        attributes = _attributes(file)
    _refuse(path, wrong_attribute(attributes))
    return attributes


@contextlib.contextmanager
def _open(path):
    """The HDF5 file of the bytes at `path`, in memory; what h5py says while it is open becomes an `InputError`."""
    content = _verified(Path(path))
    if _has_broken_heap(content):
        _refuse(path, "not a readable HDF5 file (damaged heap)")
    try:
        with h5py.File.in_memory(content) as file:
            del content  # HDF5 has its own copy
            yield file
    except HDF5_ERRORS as error:
        _refuse(path, f"not a readable HDF5 file ({error})")


def _verified(path: Path) -> bytes:
    """The bytes of a file, once they are known to be those that the manifest beside it lists, if it lists the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with generate_samples.py") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); make it again with generate_samples.py") from error
    manifest = Manifest.read(path.parent / SAMPLES_MANIFEST) if (path.parent / SAMPLES_MANIFEST).exists() else None
    if manifest is not None and path.name in manifest.names():
        advice = "make it again with generate_samples.py, or move samples that are not of this set to another folder"
        check_file(path, manifest.path, manifest.content, advice, hashlib.sha256(content).hexdigest())
    return content


def _has_broken_heap(content: bytes) -> bool:
    """Whether a global heap of an HDF5 file, where the text of its attributes stands, is damaged.

    HDF5 2.0 walks from object to object by their sizes without a check, and never returns from one of size 0. (HDF5 File
    Format Specification, III.E: signature, version and size of a collection; index, references and size of an object.)
    """
    for heap in re.finditer(rb"GCOL\x01\0\0\0", content):
        place, end = heap.end() + 8, heap.start() + int.from_bytes(content[heap.end() : heap.end() + 8], "little")
        if end > len(content):
            return True
        while place + 16 <= end:
            index, size = struct.unpack_from("<H6xQ", content, place)
            step = 16 + (size + 7) // 8 * 8 if index else size  # index 0: the free space, its header counted
            if step < 16 or place + step > end:
                return True
            place += step
    return False


# Of attributes that are read. HDF5 2.0 crashes on lists of variable length whose type is damaged; nothing here is one.
_ATTRIBUTE_TYPES = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID, h5py.h5t.TypeStringID)


def _attributes(file: h5py.File) -> dict:
    """The numbers, booleans and strings among the attributes of a file."""
    types = {name: file.attrs.get_id(name).get_type() for name in file.attrs}
    return {name: _plain(file.attrs[name]) for name, kind in types.items() if isinstance(kind, _ATTRIBUTE_TYPES)}


def _parse(file: h5py.File, path) -> Samples:
    """The samples of an open file; its shapes are checked before anything is allocated for them."""
    datasets = {name: file.get(name) for name in DTYPES}
    for name, dataset in datasets.items():
        if not isinstance(dataset, h5py.Dataset):
            _refuse(path, f"dataset {name} is missing")
        if dataset.dtype.kind not in "iu":
            _refuse(path, f"dataset {name} is of {dataset.dtype}, not of integers")
    attributes = _attributes(file)
    shapes = {name: dataset.shape or () for name, dataset in datasets.items()}
    _refuse(path, wrong_attribute(attributes) or wrong_shape(shapes, attributes))
    arrays = {}
    for name, dtype in DTYPES.items():
        stored = datasets[name][()]
        arrays[name] = stored.astype(dtype, copy=False)
        if stored.dtype != dtype and not np.array_equal(arrays[name], stored):
            _refuse(path, f"dataset {name} has values beyond {dtype.__name__}")
    return Samples(**arrays, attributes=attributes)


def _plain(value):
    """An HDF5 attribute as a Python value."""
    return value.item() if isinstance(value, np.generic) else value


def sample_name(split: str, shard: int) -> str:
    """File name of a shard of samples.

    >>> sample_name("train", 3)
    'train_shard_3.hdf5'
    """
    return f"{split}_shard_{shard}.hdf5"


def sample_paths(folder, split: str) -> list[Path]:
    """The files of samples in a folder, by shard number.

    Args:
        split: "train" or "test".
    """
    paths = [path for path in Path(folder).glob(f"{split}_shard_*.hdf5") if _SHARD.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (shard_number(path), path))


_SHARD = re.compile(r"\w+_shard_(\d+)\.hdf5")


def shard_number(path: Path) -> int:
    """The number k in a name that `sample_name` gives."""
    return int(_SHARD.fullmatch(path.name)[1])
