"""Reading shards ahead of time, and damaged ones: none is used silently."""

import collections
import copy
import gc
import shutil
import signal
import subprocess
import sys
import threading
import weakref

import h5py
import numpy as np
import pytest

from pcfg.common.files import InputError, read_json, sha256, write_json
from pretraining.data.masking import MaskingRule, mask_sentences
from pretraining.data.samples import DTYPES, SAMPLES_MANIFEST, read_samples, write_samples
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.training import sample_stream as module
from pretraining.training.sample_stream import Shards

VOCABULARY = Vocabulary([*SPECIAL_TOKENS, *(f"w{i}" for i in range(30))])


def make_folder(folder, shards, rows=40, max_seq_length=12):
    """A folder of training shards with different sentences, and its manifest."""
    files = {}
    for shard in range(shards):
        rng = np.random.default_rng(shard)
        lengths = rng.integers(3, 9, size=rows).astype(np.int32)
        flat = rng.choice(VOCABULARY.ordinary_ids(), size=lengths.sum())
        samples = mask_sentences(flat, lengths, VOCABULARY, MaskingRule(0.3, 3), max_seq_length, rng)
        samples.attributes = {
            **{"vocab_sha256": VOCABULARY.sha256, "vocab_size": VOCABULARY.size, "max_seq_length": max_seq_length},
            **{"source": f"training{shard}.txt", "source_sha256": "0" * 64, "masked_lm_prob": 0.3, "max_predictions": 3},
            **{"mask_token_prob": 0.8, "random_token_prob": 0.1, "single_mask": False},
        }
        path = folder / f"train_shard_{shard}.hdf5"
        write_samples(path, [samples])
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / SAMPLES_MANIFEST, {"made_from": {}, "files": files})
    return folder


def is_same(first, second) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in DTYPES)


@pytest.fixture
def reads(monkeypatch):
    """Name of every file that is read, and whether by the main thread."""
    found = []

    def spy(path, vocabulary):
        found.append((path.name, threading.current_thread() is threading.main_thread()))
        return read_samples(path, vocabulary)

    monkeypatch.setattr(module, "read_samples", spy)
    return found


def test_shards_come_in_order_over_and_over_and_are_read_by_a_thread(tmp_path, reads):
    make_folder(tmp_path, 3)
    with Shards(tmp_path, "train", VOCABULARY) as shards:
        for index in range(7):
            assert is_same(shards.read(index), read_samples(tmp_path / f"train_shard_{index % 3}.hdf5"))
            assert shards.read(index) is shards.read(index)
    assert [name for name, _ in reads] == [f"train_shard_{index % 3}.hdf5" for index in range(8)]
    assert [is_main for _, is_main in reads] == [True] + 7 * [False]


def test_a_single_file_is_read_once_and_nothing_ahead(tmp_path, reads):
    make_folder(tmp_path, 1)
    shards = Shards(tmp_path, "train", VOCABULARY)
    first = shards.read(0)
    assert all(shards.read(index) is first for index in range(5))
    assert [name for name, _ in reads] == ["train_shard_0.hdf5"]


def test_a_file_is_read_once_for_all_streams_at_the_same_time(tmp_path, reads):
    make_folder(tmp_path, 3)
    with Shards(tmp_path, "train", VOCABULARY, dynamic=1) as first, first.of_stream(2) as second:
        for index in (0, 1):
            found = [shards.read(index, ahead=index > 0) for shards in (first, second)]
            for seed, samples in enumerate(found, start=1):
                assert is_same(samples, Shards(tmp_path, "train", VOCABULARY, dynamic=seed).read(index, ahead=False))
            assert not is_same(*found)
            del found, samples
    # Those that are read alone are two of three.
    assert sorted(name[12] for name, _ in reads) == list("0001112")


def test_a_branch_leaves_the_file_of_its_trunk_in_memory(tmp_path, reads):
    make_folder(tmp_path, 1)
    with Shards(tmp_path, "train", VOCABULARY, dynamic=1) as trunk:
        held = trunk.read(0, ahead=False)
        for seed in (2, 3):
            trunk.of_stream(seed).read(1, ahead=False)
        trunk.read(1, ahead=False)
    assert len(reads) == 1 and len(held)


def test_another_shard_than_the_next_can_be_asked_for(tmp_path, reads):
    make_folder(tmp_path, 5)
    with Shards(tmp_path, "train", VOCABULARY) as shards:
        for index in (0, 3, 2, 12):
            assert is_same(shards.read(index), read_samples(tmp_path / f"train_shard_{index % 5}.hdf5"))
    assert [name[12] for name, _ in reads] == list("013423")


def test_only_the_first_shards_are_used(tmp_path, reads):
    make_folder(tmp_path, 3)
    with Shards(tmp_path, "train", VOCABULARY, first=2) as shards:
        for index in range(4):
            shards.read(index)
    assert {name for name, _ in reads} == {"train_shard_0.hdf5", "train_shard_1.hdf5"}


def test_an_error_of_the_thread_is_raised_where_its_shard_is_asked_for(tmp_path):
    make_folder(tmp_path, 3)
    content = (tmp_path / "train_shard_1.hdf5").read_bytes()
    (tmp_path / "train_shard_1.hdf5").write_bytes(content[:-1])
    with Shards(tmp_path, "train", VOCABULARY) as shards:
        shards.read(0)
        shards._ahead[0].join()
        shards.read(0)
        for _ in range(2):
            with pytest.raises(InputError, match=r"train_shard_1.hdf5: damaged, its SHA-256 is not the one in"):
                shards.read(1)
        shards.read(2)


@pytest.mark.parametrize("dynamic", [None, 0])
@pytest.mark.parametrize("files", [1, 40])
def test_two_shards_are_in_memory_however_many_there_are(tmp_path, monkeypatch, dynamic, files):
    make_folder(tmp_path, files, rows=5)
    arrays, most = [], collections.Counter()

    def alive():
        return len({id(array()) for array in arrays if array() is not None})

    def watched(function):
        def call(*arguments, **keywords):
            samples = function(*arguments, **keywords)
            arrays.append(weakref.ref(samples.input_ids))
            most["alive"] = max(most["alive"], alive())
            return samples

        return call

    for name in ("read_samples", "remask"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    with Shards(tmp_path, "train", VOCABULARY, dynamic=dynamic) as shards:
        for index in range(60):
            samples = shards.read(index)
            if shards._ahead:
                shards._ahead[0].join()
            del samples
    assert most["alive"] == (1 if files == 1 and dynamic is None else 2)
    del shards
    gc.collect()
    assert not alive()


def test_close_ends_the_thread_and_so_does_an_exception(tmp_path):
    make_folder(tmp_path, 2)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Shards(tmp_path, "train", VOCABULARY) as shards:
        shards.read(0)
        raise KeyboardInterrupt
    assert threading.active_count() == threads
    shards.read(1)
    shards.close()
    shards.close()
    shards.read(0)
    del shards
    assert threading.active_count() == threads


END = """
import sys, threading
from pretraining.data.vocabulary import Vocabulary
from pretraining.training import sample_stream as module

how, folder, vocabulary = sys.argv[1:]
shards = module.Shards(folder, "train", Vocabulary.read(vocabulary))
if how == "hanging":
    read, module.PATIENCE = module.read_samples, 0.1
    module.read_samples = lambda path, _: read(path) if "_0" in path.name else threading.Event().wait()
shards.read(0)
if how != "normal":
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(("how", "code"), [("normal", 0), ("hanging", -signal.SIGINT)])
def test_the_process_ends_while_a_shard_is_read(tmp_path, how, code):
    make_folder(tmp_path, 2, rows=4000)
    VOCABULARY.write(tmp_path / "vocab.txt")
    command = [sys.executable, "-c", END, how, tmp_path, tmp_path / "vocab.txt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert "Fatal" not in result.stderr and ("KeyboardInterrupt" in result.stderr) == (code != 0)


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    make_folder(tmp_path, 2)
    (tmp_path / "longer").mkdir()
    make_folder(tmp_path / "longer", 2, max_seq_length=13)
    shutil.copy(tmp_path / "longer" / "train_shard_1.hdf5", tmp_path)
    (tmp_path / SAMPLES_MANIFEST).unlink()
    with Shards(tmp_path, "train", VOCABULARY) as shards:
        assert shards.max_seq_length == 12
        shards.read(0)
        with pytest.raises(InputError, match="train_shard_1.hdf5: its samples have 13 tokens, those of the first shard 12"):
            shards.read(1)
    other = Vocabulary([*SPECIAL_TOKENS, *(f"v{i}" for i in range(30))])
    with pytest.raises(InputError, match="train_shard_0.hdf5: made with another vocabulary"):
        Shards(tmp_path, "train", other)
    with pytest.raises(InputError, match="has no test_shard_"):
        Shards(tmp_path, "test", VOCABULARY)


@pytest.fixture
def one(tmp_path):
    """A folder of one shard, and its path."""
    return make_folder(tmp_path / "one", 1, rows=200) / "train_shard_0.hdf5"


def outcome(path, undamaged) -> str:
    """What becomes of a shard in training; an `InputError` must name the file."""
    try:
        with Shards(path.parent, "train", VOCABULARY) as shards:
            return "the undamaged samples" if is_same(shards.read(0), undamaged) else "USED SILENTLY"
    except InputError as error:
        assert path.name in str(error)
        return "refused"


def damaged(content, number, rng):
    """`number` truncations and `number` flips of a bit: some in the header, some among the attributes, the rest anywhere."""
    for length in rng.integers(0, len(content), size=number):
        yield content[:length]
    attributes = content.index(b"vocab_sha256")
    for low, high in ((0, 2000), (attributes, min(attributes + 1500, len(content))), (0, len(content))):
        for place in rng.integers(low, high, size=number // 3):
            yield content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :]


def test_truncated_and_flipped_files_are_not_those_of_the_manifest(one):
    undamaged, content = read_samples(one), one.read_bytes()
    found = collections.Counter()
    for changed in damaged(content, 60, np.random.default_rng(1)):
        one.write_bytes(changed)
        found[outcome(one, undamaged)] += 1
    assert found == {"refused": 120}
    one.write_bytes(content)
    assert outcome(one, undamaged) == "the undamaged samples"


def test_truncated_and_flipped_files_without_a_manifest(one):
    undamaged, content = read_samples(one), one.read_bytes()
    (one.parent / SAMPLES_MANIFEST).unlink()
    found = collections.Counter()
    for changed in damaged(content, 60, np.random.default_rng(2)):
        one.write_bytes(changed)
        found[outcome(one, undamaged)] += 1
    assert found["refused"] + found["the undamaged samples"] == 120
    assert found["refused"] > 50


def test_files_of_another_set_under_a_name_of_this_one(one, tmp_path):
    undamaged = read_samples(one)
    other = make_folder(tmp_path / "other", 2) / "train_shard_1.hdf5"
    shutil.copy(other, one)
    assert outcome(one, undamaged) == "refused"
    with h5py.File(one, "a") as file:
        file.attrs["vocab_sha256"] = "0" * 64
    rewrite_manifest(one)
    assert outcome(one, undamaged) == "refused"


def rewrite_manifest(path):
    manifest = read_json(path.parent / SAMPLES_MANIFEST)
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(path.parent / SAMPLES_MANIFEST, manifest)


SPOILT = {
    "input_ids": [-1, VOCABULARY.size, 2**31 - 1, VOCABULARY.pad_id],
    "input_mask": [0, 2, -1],
    "segment_ids": [1, -1],
    "masked_lm_positions": [-1, 0, 11, 12, 2**31 - 1],
    "masked_lm_ids": [-1, VOCABULARY.size, VOCABULARY.pad_id, VOCABULARY.cls_id, VOCABULARY.sep_id, VOCABULARY.mask_id],
}


@pytest.mark.parametrize("name", SPOILT)
def test_wrong_numbers_in_sound_files_that_the_manifest_lists(one, name):
    undamaged = read_samples(one)
    rng = np.random.default_rng(3)
    rows = rng.choice(np.flatnonzero(undamaged.masked_lm_positions[:, 1]), size=2 * len(SPOILT[name]), replace=False)
    for number, (row, value) in enumerate(zip(rows, SPOILT[name] * 2, strict=True)):
        samples = copy.deepcopy(undamaged)
        getattr(samples, name)[row, 0 if number % 2 or name.startswith("masked") else 1] = value
        with h5py.File(one, "w") as file:
            for dataset in DTYPES:
                file[dataset] = getattr(samples, dataset)
            file.attrs.update(samples.attributes)
        rewrite_manifest(one)
        assert outcome(one, undamaged) == "refused", (row, value)
