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
import io
import re
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


def write_samples(path, samples: Samples) -> None:
    """Write samples to an HDF5 file, atomically; the same samples give the same bytes.

    Raises:
        InputError: `Samples.check` refuses them, or the file can't be written.
    """
    samples.check(path)
    # made in memory (some 20 MB a million samples): h5py reports a full disk as a RuntimeError that names no cause
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in DTYPES:
            array = getattr(samples, name)
            # shuffle + the lowest gzip level: ids use one or two of their four bytes. No times: the bytes are a
            # function of the samples alone
            file.create_dataset(
                name,
                data=array,
                chunks=(min(ROWS_A_CHUNK, len(array)), array.shape[1]),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
                track_times=False,
            )
        for name in sorted(samples.attributes):
            file.attrs[name] = samples.attributes[name]
    with atomic_open(path, "wb") as file:
        file.write(buffer.getbuffer())


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
