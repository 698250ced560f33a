import shutil

import h5py
import pytest

from pcfg.artefacts import InputError, read_json
from pretraining.training import state
from pretraining.training.metrics import Metrics, read_metrics

SAVING = "--save_steps 2,4,6"


@pytest.fixture
def states(train):
    """The folder of training states of a run of 8 steps that keeps three."""
    return train(f"{SAVING} --keep_checkpoints 3", job="first").parent / "training_state"


def test_latest_and_pruning(states):
    assert state.latest(states).name == "step0000008"
    assert sorted(path.name for path in states.glob("step*")) == ["step0000004", "step0000006", "step0000008"]
    saved = state.read(states / "step0000006")
    assert saved["progress"]["samples"] == 6 * 32
    assert saved["arguments"]["save_steps"] == [2, 4, 6]
    assert set(saved["files"]) == {path.name for path in (states / "step0000006").iterdir()} - {"state.json"}


def test_another_run_goes_on_from_a_state(train, states):
    final = train(f"--max_steps 10 --load_training_checkpoint {states} --load_checkpoint_id step0000006", job="second")
    assert [record["step"] for record in read_metrics(final.parent / "metrics.jsonl")] == [7, 8, 9, 10]
    assert read_json(final / "args.json")["samples_seen"] == 10 * 32


def test_a_run_goes_back_to_its_own_earlier_state(train, states):
    flags = f"--lr 1e-3 {SAVING} --keep_checkpoints 9 --load_training_checkpoint {states} --load_checkpoint_id step0000004"
    final = train(flags, job="first")
    assert [record["step"] for record in read_metrics(final.parent / "metrics.jsonl")] == list(range(1, 9))
    assert state.latest(states).name == "step0000008-2"


def test_unknown_states_are_named(train, states, tmp_path):
    with pytest.raises(InputError, match="no state 'step0000005'; there are: step0000004, step0000006, step0000008"):
        train(f"--load_training_checkpoint {states} --load_checkpoint_id step0000005", job="second")
    with pytest.raises(InputError, match="no training state; there are: none"):
        train(f"--load_training_checkpoint {tmp_path}", job="second")


def test_a_flipped_byte_is_found(train, states):
    file = next((states / "step0000008").glob("*.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: damaged"):
        train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")


def test_foreign_and_missing_files_are_refused(train, states):
    folder = states / "step0000008"
    shutil.copy(next(folder.glob("*.pt")), folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(InputError, match="optim_states.pt: isn't part of this training state"):
        train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    next(folder.glob("*.pt")).unlink()
    with pytest.raises(InputError, match="is missing"):
        train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")


def test_broken_descriptions_say_what_to_do(train, states):
    last = states / "step0000008"
    next(last.glob("*.pt")).write_bytes(b"")
    others = rf"write the tag of another state \(step000000[46], step000000[46]\) into {states / 'latest'}"
    with pytest.raises(InputError, match=f"damaged.*{others}"):
        train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")
    (last / "state.json").write_text('{"progress": {}}')
    with pytest.raises(InputError, match="state.json: 'arguments' is missing"):
        train("--max_steps 10", job="first")
    (states / "latest").write_text("step0000007")
    with pytest.raises(InputError, match="latest: names 'step0000007', which has no state.json"):
        train("--max_steps 10", job="first")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden_size 32", "hidden_size was 16, now 32"),
        ("--optimizer_type sgd", "optimizer_type was 'adamw', now 'sgd'"),
        ("--zero_stage 1", "zero_stage was 0, now 1"),
    ],
)
def test_a_state_of_another_model_is_refused(train, states, flags, message):
    with pytest.raises(InputError, match=message):
        train(f"--load_training_checkpoint {states} {flags}", job="second")


def test_other_arguments_in_the_same_folder(train, states):
    with pytest.raises(InputError, match="lr was 0.005, now 0.001"):
        train("--lr 1e-3", job="first")
    with pytest.raises(InputError, match="would delete the state"):
        train(f"--lr 1e-3 --overwrite --load_training_checkpoint {states}", job="first")
    other = states.parent / "notes.txt"
    other.write_text("mine")
    final = train("--lr 1e-3 --overwrite --max_steps 3", job="first")
    assert other.read_text() == "mine"
    assert sorted(path.name for path in final.parent.glob("step*")) == ["step0000003"]
    assert [record["step"] for record in read_metrics(final.parent / "metrics.jsonl")] == [1, 2, 3]


def test_metrics_forget_what_will_be_done_again(tmp_path):
    options = type("Options", (), {"project_name": None})
    metrics = Metrics(tmp_path, 0, options)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1.0 / step})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Metrics(tmp_path, 2, options).close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", ['{"step": 2', "[1]", '{"loss": 1.0}', "\udcff"])
def test_damaged_metrics_are_named(tmp_path, line):
    content = '{"step": 1}\n' + line + '\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="metrics.jsonl:2: not a"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_samples_of_another_vocabulary_are_refused(train, tiny_samples, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_samples, data)
    with h5py.File(data / "train_shard_1.hdf5", "a") as file:
        file.attrs["vocab_sha256"] = "0" * 64
    with pytest.raises(InputError, match=r"train_shard_1.hdf5: made with another vocabulary \(hash 000000000000\)"):
        train("--max_steps_per_epoch 2", data=data)


def test_data_that_cannot_be_trained_on(train, tiny_samples, tmp_path):
    with pytest.raises(InputError, match="has no train_shard_"):
        data = tmp_path / "empty"
        shutil.copytree(tiny_samples / "bert-large-uncased", data / "bert-large-uncased")
        train(data=data)
    with pytest.raises(InputError, match="600 samples, fewer than --train_batch_size 1024"):
        train("--train_batch_size 1024", job="large")
    with pytest.raises(InputError, match="--max_position_embeddings: 5, but .* have 10 tokens"):
        train("--max_position_embeddings 5", job="short")
    with pytest.raises(InputError, match="33 is not a multiple"):
        train("--train_batch_size 33", job="odd")
