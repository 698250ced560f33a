"""The HDF5 files of samples: what is written is read back, and damage is named."""

import dataclasses
import os

import h5py
import numpy as np
import pytest

from pcfg.artefacts import InputError
from pretraining.data.masking import MaskingRule, mask_sentences
from pretraining.data.samples import DTYPES, Samples, read_samples, sample_name, sample_paths, write_samples
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary([*SPECIAL_TOKENS, *(f"w{i}" for i in range(10))])
ATTRIBUTES = {
    "vocab_sha256": VOCABULARY.sha256,
    "vocab_size": VOCABULARY.size,
    "max_seq_length": 9,
    "seed": 3,
    "source": "training0.txt",
    "source_sha256": "0" * 64,
    "masked_lm_prob": 0.3,
    "single_mask": False,
}


def make_samples(number=30) -> Samples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, size=number).astype(np.int32)
    tokens = rng.choice(VOCABULARY.ordinary_ids(), size=(number, 6)).astype(np.int32)
    tokens[np.arange(6) >= lengths[:, None]] = 0
    samples = mask_sentences(tokens, lengths, VOCABULARY, MaskingRule(0.3, 3), 9, rng)
    return dataclasses.replace(samples, attributes=dict(ATTRIBUTES))


def test_read_gives_what_was_written(tmp_path):
    samples = make_samples()
    write_samples(tmp_path / "a.hdf5", samples)
    read = read_samples(tmp_path / "a.hdf5")
    for name, dtype in DTYPES.items():
        assert np.array_equal(getattr(read, name), getattr(samples, name))
        assert getattr(read, name).dtype == dtype
    assert read.attributes == ATTRIBUTES
    assert {type(value) for value in read.attributes.values()} == {str, int, float, bool}
    assert len(read) == 30
    assert os.listdir(tmp_path) == ["a.hdf5"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a.hdf5", "other_name.hdf5"):
        write_samples(tmp_path / name, make_samples())
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "other_name.hdf5").read_bytes()
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert all(file[name].compression == "gzip" and file[name].shuffle for name in DTYPES)


def test_files_with_wider_integers_are_read(tmp_path):
    """NVIDIA's files have int64 in places."""
    samples = make_samples()
    write_raw(tmp_path / "a.hdf5", samples, dict.fromkeys(DTYPES, np.int64))
    assert np.array_equal(read_samples(tmp_path / "a.hdf5").input_ids, samples.input_ids)


def write_raw(path, samples, dtypes=DTYPES, leave_out=()):
    """A file as another program would write it, without any check."""
    with h5py.File(path, "w") as file:
        for name in DTYPES:
            if name not in leave_out:
                file[name] = getattr(samples, name).astype(dtypes[name])
        for name, value in samples.attributes.items():
            if name not in leave_out:
                file.attrs[name] = value


def spoil_position_beyond(samples):
    samples.masked_lm_positions[4, 0] = samples.input_mask[4].sum() - 1  # [SEP]
    samples.masked_lm_positions[4, 1:] = 0
    samples.masked_lm_ids[4, 1:] = 0


def spoil_order(samples):
    row = int(np.flatnonzero(samples.masked_lm_positions[:, 1])[0])
    samples.masked_lm_positions[row, :2] = samples.masked_lm_positions[row, 1::-1]


def spoil_item(name, row, column, value):
    def spoil(samples):
        getattr(samples, name)[row, column] = value

    return spoil


def spoil_array(name, change):
    return lambda samples: setattr(samples, name, change(getattr(samples, name)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_item("input_ids", 3, 1, VOCABULARY.size), "input_ids has ids from 0 to 15, the vocabulary has 15"),
        (spoil_item("input_ids", 3, 1, -1), "input_ids has ids from -1"),
        (spoil_item("masked_lm_ids", 3, 0, 99), "masked_lm_ids has ids from 0 to 99"),
        (spoil_item("masked_lm_ids", 3, 0, 0), "sample 3: a masked id is 0"),
        (spoil_item("masked_lm_ids", 3, 2, 7), "sample 3: .* not 0 after the last mask"),
        (spoil_item("masked_lm_positions", 2, slice(None), 0), "sample 2: "),
        (spoil_item("masked_lm_positions", 2, 0, -1), "sample 2: a masked position is outside"),
        (spoil_position_beyond, "sample 4: a masked position is outside"),
        (spoil_order, "masked positions don't ascend"),
        (spoil_item("input_mask", 5, 0, 0), "sample 5: input_mask"),
        (spoil_item("input_mask", 5, 1, 2), "sample 5: input_mask"),
        (spoil_item("input_mask", 5, slice(None), 0), "sample 5: input_mask"),
        (spoil_item("segment_ids", 5, 3, 1), "segment_ids is not 0"),
        (spoil_array("input_mask", lambda a: a[:, :-1]), r"input_mask has shape \(30, 8\), expected \(30, 9\)"),
        (spoil_array("masked_lm_ids", lambda a: a[:-1]), r"masked_lm_ids has shape \(29, 3\), expected \(30, 3\)"),
        (spoil_array("input_ids", lambda a: a[0]), r"input_ids has shape \(9,\)"),
        (spoil_array("attributes", lambda a: {**a, "max_seq_length": 8}), "9 columns, the attribute max_seq_length is 8"),
        (spoil_array("attributes", lambda a: {**a, "vocab_size": "15"}), "attribute vocab_size is .*'15'.*, of the wrong type"),
        (spoil_array("attributes", lambda a: {**a, "max_seq_length": [9, 9]}), "attribute max_seq_length is .*wrong type"),
    ],
)
def test_spoilt_samples_are_refused_by_reader_and_writer(tmp_path, spoil, message):
    samples = make_samples()
    spoil(samples)
    write_raw(tmp_path / "a.hdf5", samples)
    with pytest.raises(InputError, match=rf"a\.hdf5: .*{message}"):
        read_samples(tmp_path / "a.hdf5")
    with pytest.raises(InputError, match=message):
        write_samples(tmp_path / "b.hdf5", samples)
    assert not (tmp_path / "b.hdf5").exists()


@pytest.mark.parametrize("name", [*DTYPES, "vocab_sha256", "source_sha256", "vocab_size", "max_seq_length"])
def test_what_is_missing_is_named(tmp_path, name):
    write_raw(tmp_path / "a.hdf5", make_samples(), leave_out=(name,))
    with pytest.raises(InputError, match=f"{name} is missing"):
        read_samples(tmp_path / "a.hdf5")


def test_values_that_do_not_fit_are_refused(tmp_path):
    samples = make_samples()
    samples.input_mask = samples.input_mask.astype(np.int64) + 256  # would be right again once cut to one byte
    write_raw(tmp_path / "a.hdf5", samples, dict.fromkeys(DTYPES, np.int64))
    with pytest.raises(InputError, match="input_mask has values beyond int8"):
        read_samples(tmp_path / "a.hdf5")
    write_raw(tmp_path / "a.hdf5", make_samples(), DTYPES | {"input_ids": np.float32})
    with pytest.raises(InputError, match="input_ids is of float32, not of integers"):
        read_samples(tmp_path / "a.hdf5")


def test_empty_samples_are_refused(tmp_path):
    samples = make_samples()
    for name in DTYPES:
        setattr(samples, name, getattr(samples, name)[:0])
    with pytest.raises(InputError, match="no samples"):
        write_samples(tmp_path / "a.hdf5", samples)


def test_files_that_are_not_hdf5_or_damaged(tmp_path):
    path = tmp_path / "a.hdf5"
    with pytest.raises(InputError, match="no such file"):
        read_samples(path)
    path.write_text("no HDF5")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        read_samples(path)
    write_samples(path, make_samples(3000))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        read_samples(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])  # inside a compressed chunk
    with pytest.raises(InputError):
        read_samples(path)


def test_paths_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("train_shard_10.hdf5", "train_shard_2.hdf5", "test_shard_0.hdf5", ".train_shard_3.hdf5.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "train_shard_x.hdf5").touch()
    assert [path.name for path in sample_paths(tmp_path, "train")] == ["train_shard_2.hdf5", "train_shard_10.hdf5"]
    assert [path.name for path in sample_paths(tmp_path, "test")] == [sample_name("test", 0)]
    assert sample_paths(tmp_path / "none", "test") == []
