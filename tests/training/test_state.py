import errno
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pcfg.common.files import InputError, read_json, write_sealed
from pretraining.training import engine, pretrain, state, trainer
from pretraining.training.metrics import Metrics, read_metrics
from pretraining.training.state import SafeCheckpointEngine
from tests.training.conftest import assert_same_weights

SAVING = "--save_steps 2,4,6"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the run of `states` is kept for the next test."""
    return tmp_path_factory.mktemp("states") / "first"


@pytest.fixture
def states(train, made, tmp_path):
    """The folder of training states of a run of 8 steps that keeps three."""
    if made.exists():
        shutil.copytree(made, tmp_path / "first")
    else:
        shutil.copytree(train(f"{SAVING} --keep_checkpoints 3", job="first").parent, made)
    return tmp_path / "first" / "training_state"


def test_latest_and_pruning(states):
    assert state.latest(states).name == "step0000008"
    assert sorted(path.name for path in states.glob("step*")) == ["step0000004", "step0000006", "step0000008"]
    saved = state.read(states / "step0000006")
    assert saved.progress["samples"] == 6 * 32
    assert saved.arguments["save_steps"] == [2, 4, 6]
    assert set(saved.files) == {path.name for path in (states / "step0000006").iterdir()}


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


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_state_is_reported_and_the_last_whole_one_is_taken(train, states, capsys):
    undisturbed = states.parent / "step0000008"
    shutil.copytree(undisturbed, states.parent.parent / "undisturbed")
    shutil.rmtree(undisturbed)
    flip_a_byte(next((states / "step0000008").glob("*.pt")))
    (states / "step0000006" / "state.json").write_text("{}")
    capsys.readouterr()
    final = train(f"{SAVING} --keep_checkpoints 3", job="first")
    output = capsys.readouterr().out
    assert "model_states.pt: damaged, its SHA-256" in output and "step0000006/state.json: damaged" in output
    assert output.count("passed over, the newest whole training state is step0000004") == 2
    assert "step 5/8" in output and "step 4/8" not in output
    assert_same_weights(final, states.parent.parent / "undisturbed")
    # The damaged ones are out of the way: they don't count as states that are kept.
    assert sorted(path.name for path in states.iterdir()) == ["latest", "step0000004", "step0000006", "step0000008"]
    assert all(state.read(folder) for folder in states.glob("step*"))


def test_damaged_states_stay_until_the_next_is_saved(train, states, monkeypatch):
    flip_a_byte(next((states / "step0000008").glob("*.pt")))
    (states.parent / "step0000008" / "args.json").unlink()
    monkeypatch.setattr(trainer.Trainer, "run", lambda _: None)
    train(f"{SAVING} --keep_checkpoints 3", job="first")
    found = ["latest", "step0000004", "step0000006", "step0000008.damaged"]
    assert sorted(path.name for path in states.iterdir()) == found
    train(f"{SAVING} --keep_checkpoints 1", job="first")
    assert sorted(path.name for path in states.iterdir()) == ["latest", "step0000006", "step0000008.damaged"]
    with pytest.raises(InputError, match="no state 'step0000008'; there are: step0000006"):
        state.find(states, "step0000008")


def test_a_state_that_was_asked_for_has_no_substitute(train, states):
    flip_a_byte(next((states / "step0000006").glob("*.pt")))
    with pytest.raises(InputError, match="step0000006/mp_rank_00_model_states.pt: damaged"):
        train(f"--max_steps 10 --load_training_checkpoint {states} --load_checkpoint_id step0000006", job="second")


def test_nothing_whole_is_left(train, states, capsys):
    for folder in states.glob("step*"):
        next(folder.glob("*.pt")).unlink()
    with pytest.raises(
        InputError, match="model_states.pt: is missing.*no whole training state is left.*--overwrite begins anew"
    ):
        train(f"{SAVING} --max_steps 9", job="first")
    final = train(f"{SAVING} --max_steps 9 --overwrite", job="first")
    assert "warning: " in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(final.parent / "metrics.jsonl")] == list(range(1, 10))


def test_latest_names_a_state_and_no_other_folder(states, tmp_path):
    shutil.copytree(states / "step0000006", tmp_path / "elsewhere")
    for text in ("step0000007", "", "../../elsewhere", "\udcff"):
        (states / "latest").write_bytes(text.encode(errors="surrogateescape"))
        lines = []
        assert state.newest(states, lines.append).folder.name == "step0000008"
        assert len(lines) == 1 and "latest: names" in lines[0]
    (states / "latest").unlink()  # killed before it was written for the first time
    assert state.newest(states, lines.remove).folder.name == "step0000008"


def test_never_resuming(train, states):
    flags = f"{SAVING} --keep_checkpoints 3 --resume never"
    with pytest.raises(InputError, match="--resume never: .* is there; add --overwrite"):
        train(flags, job="first")
    final = train(f"{flags} --overwrite", job="first")
    assert state.read(states / "step0000006").progress["step"] == 6
    assert [record["step"] for record in read_metrics(final.parent / "metrics.jsonl")] == list(range(1, 9))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("stage", "name"), [(0, "mp_rank_00_model_states.pt"), (2, "zero_pp_rank_0_mp_rank_00_optim_states.pt")]
)
def test_a_malicious_pickle_is_refused(train, tmp_path, stage, name):
    states = train(f"--max_steps 1 --zero_stage {stage}").parent / "training_state"
    file = states / "step0000001" / name
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": Bomb(str(tmp_path / "executed"))}, file)
    with pytest.raises(InputError, match=f"{name}: damaged"):
        train(f"--zero_stage {stage} --load_training_checkpoint {states}", job="second")
    write_sealed(file.with_name("state.json"), read_json(file.with_name("state.json")))  # the hashes are right again
    with pytest.raises(InputError, match=f"{name}: refused"):
        train(f"--zero_stage {stage} --load_training_checkpoint {states}", job="second")
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have worked


def test_a_file_that_changes_after_it_was_verified_is_not_loaded(states, tmp_path):
    found = state.find(states, None)
    file = next(found.folder.glob("*.pt"))
    engine = SafeCheckpointEngine(found.saved.files)
    assert engine.load(str(file))["global_steps"] == 8
    torch.save(Bomb(str(tmp_path / "executed")), file)
    with pytest.raises(InputError, match="damaged"):
        engine.load(str(file))
    assert not (tmp_path / "executed").exists()


def test_the_loss_scale_of_float16_is_taken_up_again(train, monkeypatch):
    """On the CPU, with float16 instructions that are said to be there."""
    monkeypatch.setattr(pretrain, "precision", lambda *_: "float16")
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: [torch.float32, torch.float16, torch.bfloat16])
    scales = []
    accumulate, advance = engine.EngineLearner.accumulate, trainer.Trainer.advance

    def overflowing(self, step, batches, members):
        if step in (1, 2, 3):
            self.engine.optimizer.loss_scaler.update_scale(True)  # as after an overflow: the second one halves the scale
        return accumulate(self, step, batches, members)

    def noting(self, batch, losses):
        scaler = self.learner.engine.optimizer.loss_scaler
        scales.append((scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis))
        advance(self, batch, losses)

    monkeypatch.setattr(engine.EngineLearner, "accumulate", overflowing)
    monkeypatch.setattr(trainer.Trainer, "advance", noting)
    undisturbed = train("--save_steps 4 --fp16", job="undisturbed")
    expected = scales[:]
    assert expected[3][0] < expected[0][0]
    states = undisturbed.parent / "training_state"
    resumed = train(
        f"--fp16 --save_steps 4 --load_training_checkpoint {states} --load_checkpoint_id step0000004", job="resumed"
    )
    assert scales[8:] == expected[4:]
    assert_same_weights(undisturbed, resumed)


def test_another_versions_states_are_named(train, states):
    path = states / "step0000008" / "state.json"
    saved = read_json(path)
    write_sealed(path, {**saved, "progress": {**saved["progress"], "phase": 1}})
    with pytest.raises(InputError, match="state.json: 'phase': Extra inputs are not permitted.*another version wrote it"):
        train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")
    write_sealed(path, {name: value for name, value in saved.items() if name != "arguments"})
    with pytest.raises(InputError, match="state.json: 'arguments': Field required"):
        state.find(states, "step0000008")
    file = next((states / "step0000006").glob("*.pt"))
    content = torch.load(file, weights_only=True)
    del content["module"]["decoder_bias"]
    torch.save(content, file)
    write_sealed(file.with_name("state.json"), read_json(file.with_name("state.json")))
    with pytest.raises(InputError, match="step0000006: DeepSpeed can't load it .*from another version"):
        train(f"--max_steps 10 --load_training_checkpoint {states} --load_checkpoint_id step0000006", job="second")


def test_states_of_earlier_versions_are_read(train, states):
    """They have another name for the number of parameters, and may have null for the initial weights."""
    path = states / "step0000008" / "state.json"
    saved = read_json(path)
    write_sealed(path, {**saved, "number_of_parameters": saved.pop("parameters"), "initial_weights": None})
    resumed = train(f"--max_steps 10 --load_training_checkpoint {states}", job="second")
    assert "parameters" in read_json(resumed / "args.json") and read_json(resumed / "args.json")["step"] == 10


@pytest.mark.parametrize("writer", [(torch, "save"), (state, "write_sealed")])
def test_a_full_disk_keeps_the_last_state(train, states, monkeypatch, writer):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = f"--max_steps 12 --save_steps 10 --load_training_checkpoint {states}"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="step0000010: the disk is full.*; free some space"):
        patch.setattr(*writer, no_space)
        train(flags, job="first")
    assert not list(states.glob(".*")) and state.newest(states).folder.name == "step0000008"
    assert train(flags, job="first").name == "step0000012"


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


def test_metrics_on_a_full_disk(tmp_path):
    metrics = Metrics(tmp_path, 0, type("Options", (), {"project_name": None}))
    metrics.write({"step": 1})
    file = metrics._file

    class Full:
        def write(self, line):
            return file.write(line[:5])

    metrics._file = Full()
    with pytest.raises(InputError, match="metrics.jsonl: the disk is full"):
        metrics.write({"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("line", ['{"step": 2', "[1]", '{"loss": 1.0}', "\udcff"])
def test_damaged_metrics_are_named(tmp_path, line):
    content = '{"step": 1}\n' + line + '\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="metrics.jsonl:2: not a"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_samples_of_another_vocabulary_are_refused(train, tiny_samples, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_samples, data)
    (data / "manifest_samples.json").unlink()  # it would find the change first
    with h5py.File(data / "train_shard_1.hdf5", "a") as file:
        file.attrs["vocab_sha256"] = np.bytes_("0" * 64)
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
