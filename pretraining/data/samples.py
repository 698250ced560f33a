"""Files of masked samples: HDF5 in the layout of NVIDIA's and academic-budget-bert's BERT data.

`train_shard_{k}.hdf5` and `test_shard_{k}.hdf5` hold five integer datasets, one row a sample:

    input_ids               (n, T)  [CLS] words [SEP] [PAD]..., the masked words replaced
    input_mask              (n, T)  1 at [CLS], words and [SEP], 0 at padding
    segment_ids             (n, T)  all 0: a sample is one segment
    masked_lm_positions     (n, P)  columns of input_ids, ascending, then 0 where a sample has fewer than P masks
    masked_lm_ids           (n, P)  the words that stood there, 0 where there is no mask

The file's attributes say how it was made; `REQUIRED_ATTRIBUTES` are what a reader needs to know that it fits.
"""

import dataclasses
import functools
import io
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from pcfg.artefacts import InputError, atomic_open

DTYPES = {
    "input_ids": np.int32,
    "input_mask": np.int8,
    "segment_ids": np.int8,
    "masked_lm_positions": np.int32,
    "masked_lm_ids": np.int32,
}
REQUIRED_ATTRIBUTES = {
    "vocab_sha256": str,
    "vocab_size": int | np.integer,
    "max_seq_length": int | np.integer,
    "source": str,
    "source_sha256": str,
}
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
            InputError: an attribute is missing or of the wrong type, shapes disagree, ids are out of range, or masks stand
                outside the sentence.
        """
        problem = self._wrong_attribute() or self._wrong_shape() or self._wrong_tokens() or self._wrong_masks()
        if problem:
            raise InputError(f"{source}: {problem}; make the samples again with generate_samples.py")

    def _wrong_attribute(self) -> str | None:
        for name, kind in REQUIRED_ATTRIBUTES.items():
            if name not in self.attributes:
                return f"attribute {name} is missing"
            if not isinstance(self.attributes[name], kind):
                return f"attribute {name} is {self.attributes[name]!r}, of the wrong type"
        return None

    def _wrong_shape(self) -> str | None:
        arrays = {name: getattr(self, name) for name in DTYPES}
        for name, array in arrays.items():
            if array.ndim != 2 or array.shape[1] == 0 or array.dtype != DTYPES[name]:
                wanted = f"two dimensions of {DTYPES[name].__name__}"
                return f"{name} has shape {array.shape} and type {array.dtype}, not {wanted}"
        rows, width = self.input_ids.shape
        if rows == 0:
            return "no samples"
        if width != self.attributes["max_seq_length"]:
            return f"input_ids has {width} columns, the attribute max_seq_length is {self.attributes['max_seq_length']}"
        for name, array in arrays.items():
            expected = self.masked_lm_positions.shape if name.startswith("masked_lm") else self.input_ids.shape
            if array.shape != (rows, expected[1]):
                return f"{name} has shape {array.shape}, expected {(rows, expected[1])}"
        return None

    def _wrong_tokens(self) -> str | None:
        for name in ("input_ids", "masked_lm_ids"):
            low, high, size = getattr(self, name).min(), getattr(self, name).max(), self.attributes["vocab_size"]
            if low < 0 or high >= size:
                return f"{name} has ids from {low} to {high}, the vocabulary has {size} entries"
        if self.segment_ids.any():
            return "segment_ids is not 0 everywhere; the models know one segment"
        lengths = np.count_nonzero(self.input_mask, axis=1)  # (n,), [CLS] and [SEP] included
        sentence = np.arange(self.input_mask.shape[1]) < lengths[:, None]  # (n, T)
        bad = (self.input_mask != sentence).any(axis=1) | (lengths < 3)
        if bad.any():
            return f"sample {bad.argmax()}: input_mask is not 1 at [CLS], one word or more and [SEP], then 0"
        return None

    def _wrong_masks(self) -> str | None:
        positions = self.masked_lm_positions
        lengths = self.input_mask.sum(axis=1, dtype=np.int32)
        is_mask = np.arange(positions.shape[1]) < np.count_nonzero(positions, axis=1)[:, None]  # (n, P)
        outside = ((positions < 1) | (positions > lengths[:, None] - 2)) & is_mask
        out_of_order = (positions[:, 1:] <= positions[:, :-1]) & is_mask[:, 1:]
        unused = ~is_mask & ((positions != 0) | (self.masked_lm_ids != 0))
        for bad, what in (
            (outside, "a masked position is outside the words of the sentence"),
            (out_of_order, "masked positions don't ascend"),
            (unused, "masked positions or ids are not 0 after the last mask"),
            (~is_mask[:, :1], "no masked position"),
            (is_mask & (self.masked_lm_ids == 0), "a masked id is 0, [PAD]"),
        ):
            if bad.any():
                return f"sample {bad.any(axis=1).argmax()}: {what}"
        return None


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


def read_samples(path) -> Samples:
    """The samples in an HDF5 file.

    Raises:
        InputError: no such file, not HDF5 or damaged, a dataset missing or not of integers that fit, or `Samples.check`
            refuses it.
    """
    again = "make it again with generate_samples.py"
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; {again}")
    try:
        with h5py.File(path, "r") as file:
            arrays = {}
            for name, dtype in DTYPES.items():
                dataset = file.get(name)
                if not isinstance(dataset, h5py.Dataset):
                    raise InputError(f"{path}: dataset {name} is missing; {again}")
                if dataset.dtype.kind not in "iu":
                    raise InputError(f"{path}: dataset {name} is of {dataset.dtype}, not of integers; {again}")
                stored = dataset[()]
                arrays[name] = stored.astype(dtype, copy=False)
                if not np.array_equal(arrays[name], stored):
                    raise InputError(f"{path}: dataset {name} has values beyond {dtype.__name__}; {again}")
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error}); {again}") from error
    samples = Samples(**arrays, attributes=attributes)
    samples.check(path)
    return samples


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
    pattern = re.compile(re.escape(split) + r"_shard_(\d+)\.hdf5")
    numbered = [(pattern.fullmatch(path.name), path) for path in Path(folder).glob(f"{split}_shard_*.hdf5")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]
