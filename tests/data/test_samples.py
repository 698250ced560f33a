"""The HDF5 files of samples: what is written is read back, and damage is named."""

import copy
import dataclasses
import hashlib
import itertools
import os

import h5py
import numpy as np
import pytest

from pcfg.common.files import InputError, write_json
from pretraining.data.masking import MaskingRule, mask_sentences
from pretraining.data.samples import (
    DTYPES,
    ROWS_PER_CHUNK,
    SAMPLES_MANIFEST,
    Samples,
    read_attributes,
    read_samples,
    sample_name,
    sample_paths,
    write_samples,
)
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
    flat = rng.choice(VOCABULARY.ordinary_ids(), size=lengths.sum())
    samples = mask_sentences(flat, lengths, VOCABULARY, MaskingRule(0.3, 3), 9, rng)
    return dataclasses.replace(samples, attributes=dict(ATTRIBUTES))


def test_read_gives_what_was_written(tmp_path):
    samples = make_samples()
    write_samples(tmp_path / "a.hdf5", [samples])
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
        write_samples(tmp_path / name, [make_samples()])
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "other_name.hdf5").read_bytes()
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert all(file[name].compression == "gzip" and file[name].shuffle for name in DTYPES)


def cut(samples, first, last) -> Samples:
    parts = {name: getattr(samples, name)[first:last] for name in DTYPES}
    return Samples(**parts, attributes=samples.attributes)


def test_blocks_change_nothing_and_rows_need_not_fill_a_chunk(tmp_path):
    samples = make_samples(3 * ROWS_PER_CHUNK + 5)
    write_samples(tmp_path / "whole.hdf5", [samples])
    edges = (0, ROWS_PER_CHUNK, 3 * ROWS_PER_CHUNK, len(samples))
    write_samples(tmp_path / "cut.hdf5", (cut(samples, *pair) for pair in itertools.pairwise(edges)))
    assert (tmp_path / "whole.hdf5").read_bytes() == (tmp_path / "cut.hdf5").read_bytes()
    read = read_samples(tmp_path / "whole.hdf5")
    for name in DTYPES:
        assert np.array_equal(getattr(read, name), getattr(samples, name))
    with pytest.raises(ValueError, match="multiple"):
        write_samples(tmp_path / "other.hdf5", [cut(samples, 0, 7), cut(samples, 7, 9)])
    spoilt = cut(samples, ROWS_PER_CHUNK, len(samples))
    spoilt.segment_ids[0, 0] = 1
    with pytest.raises(InputError, match=f"from row {ROWS_PER_CHUNK} on: sample 0: segment_ids"):
        write_samples(tmp_path / "other.hdf5", [cut(samples, 0, ROWS_PER_CHUNK), spoilt])
    assert sorted(os.listdir(tmp_path)) == ["cut.hdf5", "whole.hdf5"]


@pytest.mark.parametrize("vocabulary_size", [15, 256, 257, 65_537, 1 << 24, 1 << 31])
def test_ids_of_one_to_four_bytes_come_back_and_files_are_no_larger_than_those_of_hdf5_itself(tmp_path, vocabulary_size):
    samples = make_samples(5000)
    rng = np.random.default_rng(1)
    is_word = (samples.input_mask == 1) & (samples.input_ids > 4)
    samples.input_ids[is_word] = rng.integers(5, vocabulary_size, size=is_word.sum())
    is_mask = samples.masked_lm_positions > 0
    samples.masked_lm_ids[is_mask] = rng.integers(5, vocabulary_size, size=is_mask.sum())
    samples.input_ids[7, 1] = vocabulary_size - 1
    samples.attributes["vocab_size"] = vocabulary_size
    write_samples(tmp_path / "ours.hdf5", [samples])
    write_format_1(tmp_path / "theirs.hdf5", samples)
    list_in_manifest(tmp_path / "theirs.hdf5")
    ours, theirs = (read_samples(tmp_path / name) for name in ("ours.hdf5", "theirs.hdf5"))
    for name in DTYPES:
        assert np.array_equal(getattr(ours, name), getattr(samples, name))
        assert np.array_equal(getattr(theirs, name), getattr(samples, name))
    assert (tmp_path / "ours.hdf5").stat().st_size <= (tmp_path / "theirs.hdf5").stat().st_size


def test_files_with_wider_integers_are_read(tmp_path):
    """NVIDIA's files have int64 in places."""
    samples = make_samples()
    write_raw(tmp_path / "a.hdf5", samples, dict.fromkeys(DTYPES, np.int64))
    assert np.array_equal(read_samples(tmp_path / "a.hdf5").input_ids, samples.input_ids)


def test_files_of_other_programs_take_the_vocabulary_that_the_user_gives(tmp_path):
    """They have no attributes, and labels of next sentences."""
    samples = make_samples()
    path = tmp_path / "train_shard_0.hdf5"
    write_raw(path, dataclasses.replace(samples, attributes={}))
    with h5py.File(path, "a") as file:
        file["next_sentence_labels"] = np.zeros(len(samples), np.int8)
    with pytest.raises(InputError, match="attribute vocab_sha256 is missing"):
        read_samples(path)
    read = read_samples(path, VOCABULARY)
    read.check_vocabulary(VOCABULARY, path)
    assert all(np.array_equal(getattr(read, name), getattr(samples, name)) for name in DTYPES)
    facts = {"vocab_sha256": VOCABULARY.sha256, "vocab_size": VOCABULARY.size, "max_seq_length": samples.input_ids.shape[1]}
    facts |= {"source": path.name, "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert read.attributes == read_attributes(path, VOCABULARY) == facts
    with pytest.raises(InputError, match=r"the vocabulary has 6 entries"):
        read_samples(path, Vocabulary([*SPECIAL_TOKENS, "cat"]))
    mixed = Vocabulary([SPECIAL_TOKENS[0], "cat", *SPECIAL_TOKENS[1:], *map(str, range(20))])  # [CLS] has another id
    with pytest.raises(InputError, match=r"sample 0: input_ids doesn't begin with \[CLS\]"):
        read_samples(path, mixed).check_vocabulary(mixed, path)
    spoilt = dataclasses.replace(samples, attributes={}, segment_ids=samples.input_mask)
    write_raw(path, spoilt)
    with pytest.raises(InputError, match="sample 0: segment_ids is not 0: made for next-sentence prediction"):
        read_samples(path, VOCABULARY)


def write_raw(path, samples, dtypes=DTYPES, leave_out=()):
    """A file as another program would write it, without any check."""
    with h5py.File(path, "w") as file:
        for name in DTYPES:
            if name not in leave_out:
                file[name] = getattr(samples, name).astype(dtypes[name])
        for name, value in samples.attributes.items():
            if name not in leave_out:
                file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value


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
        (spoil_item("input_ids", 4, 1, 0), r"sample 4: input_ids is not \[PAD\] where input_mask is 0, and nowhere else"),
        (spoil_item("input_ids", 4, -1, 7), r"sample 4: input_ids is not \[PAD\]"),
        (spoil_item("masked_lm_ids", 3, 2, 7), "sample 3: .* not 0 after the last mask"),
        (spoil_item("masked_lm_positions", 2, slice(None), 0), "sample 2: "),
        (spoil_item("masked_lm_positions", 2, 0, -1), "sample 2: a masked position is outside"),
        (spoil_position_beyond, "sample 4: a masked position is outside"),
        (spoil_order, "masked positions don't ascend"),
        (spoil_item("input_mask", 5, 0, 0), "sample 5: input_mask"),
        (spoil_item("input_mask", 5, 1, 2), "sample 5: input_mask"),
        (spoil_item("input_mask", 5, slice(None), 0), "sample 5: input_mask"),
        (spoil_item("segment_ids", 5, 3, 1), "sample 5: segment_ids is not 0"),
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
        write_samples(tmp_path / "b.hdf5", [samples])
    assert not (tmp_path / "b.hdf5").exists()


def naive_is_laid_out(samples, row) -> bool:
    """The layout of one sample, in the module's words."""
    ids, mask, segments, positions, labels = (getattr(samples, name)[row].tolist() for name in DTYPES)
    length, masks = sum(mask), sum(position != 0 for position in positions)
    return (
        mask == [1] * length + [0] * (len(mask) - length)
        and length >= 3
        and segments == [0] * len(mask)
        and all(0 < index < VOCABULARY.size for index in ids[:length])
        and ids[length:] == [0] * (len(ids) - length)
        and masks >= 1
        and positions[:masks] == sorted(set(positions[:masks]))
        and all(1 <= position <= length - 2 for position in positions[:masks])
        and all(0 < index < VOCABULARY.size for index in labels[:masks])
        and positions[masks:] + labels[masks:] == [0] * 2 * (len(positions) - masks)
    )


def test_every_changed_number_is_judged_as_the_layout_says():
    rng, refused, whole = np.random.default_rng(0), 0, make_samples(3)
    for _ in range(1500):
        samples = copy.deepcopy(whole)
        array = getattr(samples, rng.choice(list(DTYPES)))
        row, column = rng.integers(3), rng.integers(array.shape[1])
        array[row, column] = rng.choice([-1, 0, 1, 2, 3, 5, 7, VOCABULARY.size - 1, VOCABULARY.size])
        if naive_is_laid_out(samples, row):
            samples.check("a")
            continue
        refused += 1
        with pytest.raises(InputError, match=rf"^a: (sample {row}: |(input|masked_lm)_ids has ids from)"):
            samples.check("a")
    assert 500 < refused < 1400


def spoil_end(samples):
    samples.input_ids[2, samples.input_mask[2].sum() - 1] = 7


def spoil_word(index):
    return lambda samples: samples.input_ids.__setitem__(unmasked_word(samples, 2), index)


def unmasked_word(samples, row):
    words = range(1, samples.input_mask[row].sum() - 1)
    return row, next(column for column in words if column not in samples.masked_lm_positions[row])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_item("input_ids", 2, 0, 7), r"sample 2: input_ids doesn't begin with \[CLS\]"),
        (spoil_end, r"sample 2: .* and end with \[SEP\]"),
        (spoil_item("masked_lm_ids", 2, 0, VOCABULARY.cls_id), "sample 2: a masked id is a special token"),
        (spoil_word(VOCABULARY.mask_id), "sample 2: a special token stands where a word should"),
        (spoil_word(VOCABULARY.sep_id), "sample 2: a special token stands where a word should"),
        (spoil_array("attributes", lambda a: {**a, "vocab_size": VOCABULARY.size + 1}), "another vocabulary"),
        (spoil_array("attributes", lambda a: {**a, "vocab_sha256": "0" * 64}), r"another vocabulary \(hash 000000000000\)"),
    ],
)
def test_samples_that_are_not_the_vocabularys_are_refused(spoil, message):
    samples = make_samples()
    samples.check_vocabulary(VOCABULARY, "a")
    spoil(samples)
    samples.check("a")
    with pytest.raises(InputError, match=f"^a: .*{message}"):
        samples.check_vocabulary(VOCABULARY, "a")


def test_what_replaces_a_masked_word_and_unknown_words_are_not_judged():
    samples = make_samples()
    samples.input_ids[2, samples.masked_lm_positions[2, 0]] = VOCABULARY.sep_id
    samples.input_ids[unmasked_word(samples, 2)] = VOCABULARY.unk_id
    samples.check("a")
    samples.check_vocabulary(VOCABULARY, "a")


def list_in_manifest(path, **entry):
    content = path.read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **entry}
    write_json(path.parent / SAMPLES_MANIFEST, {"made_from": {}, "files": {path.name: entry}})


def test_the_manifest_decides_whether_a_file_is_read(tmp_path):
    path = tmp_path / "a.hdf5"
    write_samples(path, [make_samples()])
    list_in_manifest(path)
    assert len(read_samples(path)) == 30
    assert read_attributes(path) == ATTRIBUTES
    write_samples(path, [make_samples(31)])
    for read in (read_samples, read_attributes):
        with pytest.raises(InputError, match=r"a.hdf5: damaged, its SHA-256 is not the one in .*manifest_samples.json"):
            read(path)
    path.rename(tmp_path / "b.hdf5")
    assert len(read_samples(tmp_path / "b.hdf5")) == 31  # not listed


@pytest.mark.parametrize("content", ["{}", '{"files": {"a.hdf5": 3}}', '{"files": {"a.hdf5": {"size": 3}}}', "{", "[]"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    write_samples(tmp_path / "a.hdf5", [make_samples()])
    (tmp_path / SAMPLES_MANIFEST).write_text(content)
    with pytest.raises(InputError, match=f"{SAMPLES_MANIFEST}: "):
        read_samples(tmp_path / "a.hdf5")


def write_format_1(path, samples):
    """A file as versions before format 2 wrote it: text of variable length, no checksums."""
    with h5py.File(path, "w") as file:
        for name in DTYPES:
            chunks = (min(ROWS_PER_CHUNK, len(samples)), getattr(samples, name).shape[1])
            file.create_dataset(name, data=getattr(samples, name), chunks=chunks, compression=1, shuffle=True)
        file.attrs.update(samples.attributes)


def test_files_of_format_1_are_read_if_the_manifest_lists_them(tmp_path):
    samples = make_samples()
    write_format_1(tmp_path / "a.hdf5", samples)
    list_in_manifest(tmp_path / "a.hdf5")
    read = read_samples(tmp_path / "a.hdf5")
    assert all(np.array_equal(getattr(read, name), getattr(samples, name)) for name in DTYPES)
    assert read.attributes == read_attributes(tmp_path / "a.hdf5") == ATTRIBUTES


def test_text_that_hdf5_could_hang_on_is_not_read(tmp_path):
    """HDF5 2.0 walks for ever through a heap of text of variable length that has an object of size 0."""
    path = tmp_path / "a.hdf5"
    write_format_1(path, make_samples())
    content, heap = path.read_bytes(), path.read_bytes().index(b"GCOL\x01")
    first = heap + 16  # index, references, size of the first object
    for place, value in ((first, 0), (first + 8, 255), (first + 15, 255), (heap + 14, 1)):
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        with pytest.raises(InputError, match="attribute source is text of variable length, and no manifest_samples.json lists"):
            read_samples(path)
        list_in_manifest(path)
        path.write_bytes(content)
        with pytest.raises(InputError, match="a.hdf5: damaged, its SHA-256"):
            read_samples(path)
        (tmp_path / SAMPLES_MANIFEST).unlink()


def test_attributes_of_a_type_that_hdf5_could_crash_on_are_not_read(tmp_path):
    """One bit turns a string into a list of variable length; another one makes HDF5 2.0 crash where it reads the list."""
    path = tmp_path / "a.hdf5"
    write_format_1(path, make_samples())
    content = path.read_bytes()
    for name in ("source", "source_sha256", "vocab_sha256"):
        field = name.encode() + bytes(-len(name) % 8 or 8) + b"\x19\x01\x01"
        kind = content.index(field) + len(field) - 2  # class 9 of version 1, then 0: list, 1: string
        content = content[:kind] + b"\0" + content[kind + 1 :]
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.hdf5: attribute vocab_sha256 is missing"):
        read_samples(path)


def test_every_changed_byte_of_a_file_that_no_manifest_lists_is_harmless_or_refused(tmp_path):
    """Checksums of HDF5: what is read is what was written, or nothing."""
    path, samples = tmp_path / "a.hdf5", make_samples(3)
    write_samples(path, [samples])
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        try:
            read = read_samples(path)
        except InputError as error:
            refused += 1
            assert "a.hdf5" in str(error)
        else:
            assert all(np.array_equal(getattr(read, name), getattr(samples, name)) for name in DTYPES)
            assert read.attributes == samples.attributes
    assert refused > 1000


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
    for blocks in ([samples], []):
        with pytest.raises(InputError, match="a.hdf5: no samples"):
            write_samples(tmp_path / "a.hdf5", blocks)
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_hdf5_or_damaged(tmp_path):
    path = tmp_path / "a.hdf5"
    with pytest.raises(InputError, match="no such file"):
        read_samples(path)
    path.write_text("no HDF5")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        read_samples(path)
    write_samples(path, [make_samples(3000)])
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
