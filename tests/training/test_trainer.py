import functools
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

from pcfg.chart import Chart
from pcfg.common.files import InputError, keyed_rng, read_json
from pcfg.grammar import Grammar
from pcfg.sampler import Sampler
from pretraining.data.samples import read_samples
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, load_vocabulary
from pretraining.training import sample_stream, trainer
from pretraining.training.batches import global_batches
from pretraining.training.metrics import read_metrics
from pretraining.training.sample_stream import Shards
from pretraining.training.state import latest as read_latest
from tests.training.conftest import NO_DROPOUT, PLAIN_SGD, assert_same_weights, crash_after_saving


def curve(job):
    """Step, loss and learning rate (or validation loss) of each record."""
    return [(r["step"], r.get("loss"), r.get("lr"), r.get("validation_loss")) for r in read_metrics(job / "metrics.jsonl")]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_one_step_is_the_gradient_of_the_padded_batch(train, tiny_samples, naive_loss, relative_error, zero_stage):
    final = train(f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --save_steps 0 --zero_stage {zero_stage}")
    before = load_model(final.parent / "step0000000").train()
    samples = read_samples(tiny_samples / "train_shard_0.hdf5")
    loss = naive_loss(before, samples, global_batches(len(samples), 32, 42, 0, "")[0])
    assert read_metrics(final.parent / "metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    assert relative_error(before, load_model(final)) < 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_zero_changes_no_step_in_bf16(train, zero_stage):
    flags = f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --bf16"
    assert_same_weights(train(flags, job="plain"), train(f"{flags} --zero_stage {zero_stage}", job="zero"))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--zero_stage 2 --bf16",
        "--optimizer_type lamb",
        "--optimizer_type adafactor",
        "--max_steps_per_epoch 3 --dynamic_masking",
    ],
)
def test_resumed_and_undisturbed_runs_agree_bit_for_bit(train, monkeypatch, flags):
    flags += " --save_steps 2,5 --do_validation --validation_epochs 1"
    undisturbed = train(flags, job="undisturbed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after_saving(patch, 2)
        train(flags, job="crashed")
    resumed = train(flags, job="crashed")
    assert_same_weights(undisturbed, resumed)
    assert curve(undisturbed.parent) == curve(resumed.parent)
    assert read_json(resumed / "args.json")["samples_seen"] == 8 * 32


@pytest.mark.parametrize(("steps", "epochs", "shards"), [(2, 9, "0"), (3, 9, "01"), (4, 9, "01"), (9, 2, "01")])
def test_only_the_shards_of_a_run_are_read(train, monkeypatch, steps, epochs, shards):
    read, names = sample_stream.read_samples, []
    monkeypatch.setattr(sample_stream, "read_samples", lambda path, words: names.append(path.name) or read(path, words))
    train(f"--max_steps {steps} --num_epochs {epochs} --max_steps_per_epoch 2")
    assert sorted(names) == [f"train_shard_{shard}.hdf5" for shard in shards]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lamb", "adafactor", "sgd"])
def test_every_optimizer_learns(train, optimizer):
    lr = {"sgd": 0.5, "lamb": 0.05}.get(optimizer, 0.01)
    final = train(f"--optimizer_type {optimizer} --lr {lr} --max_steps 30 {NO_DROPOUT}")
    losses = [loss for _, loss, _, _ in curve(final.parent)]
    assert np.mean(losses[-5:]) < losses[0] - 0.2


def test_bf16_follows_float32(train, capsys, monkeypatch):
    exact = curve(train(NO_DROPOUT, job="float32").parent)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    rounded = curve(train(f"{NO_DROPOUT} --fp16", job="fp16").parent)
    assert "--fp16 needs CUDA; training in bfloat16" in capsys.readouterr().out
    assert rounded != exact
    assert [loss for _, loss, _, _ in rounded] == pytest.approx([loss for _, loss, _, _ in exact], abs=0.02)


def test_validation_is_the_mean_over_all_masks(train, tiny_samples, naive_loss):
    final = train("--do_validation --max_steps 2 --validation_micro_batch 7")
    record = read_metrics(final.parent / "metrics.jsonl")[-1]
    samples = read_samples(tiny_samples / "test_shard_0.hdf5")
    with torch.no_grad():
        expected = naive_loss(load_model(final), samples, np.arange(len(samples)))
    assert record["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert record["validation_masks"] == np.count_nonzero(samples.masked_lm_positions)


def test_the_gap_is_the_mean_divergence_from_the_grammar(train, tiny_rules):
    final = train(f"--do_validation --max_steps 2 --rule-path {tiny_rules} --gap_sentences 20")
    record = read_metrics(final.parent / "metrics.jsonl")[-1]
    grammar, model, vocabulary = Grammar.read(tiny_rules), load_model(final), load_vocabulary(final)
    tokens, lengths = Sampler(grammar, 8).sample(20, keyed_rng(42, "gap sentences"))
    conditionals, first = Chart(grammar).conditionals(tokens, lengths)
    ids = np.array([vocabulary.ids[word] for word in grammar.words])
    means = []
    for sentence, length, row in zip(tokens, lengths, first[:-1], strict=True):
        divergences = []
        for position in range(length):
            masked = [vocabulary.cls_id, *ids[sentence[:length]], vocabulary.sep_id]
            masked[1 + position] = vocabulary.mask_id
            with torch.no_grad():
                log_f = model(torch.tensor([masked]), None, torch.tensor([1 + position]))[0].double().log_softmax(-1)
            pairs = zip(conditionals[row + position], log_f[ids].tolist(), strict=True)
            divergences.append(sum(p * (np.log(p) - log) for p, log in pairs if p > 0))
        means.append(np.mean(divergences))
    assert record["gap_sentences"] == pytest.approx(np.mean(means), rel=1e-4)
    assert record["gap_sentences_se"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(20), rel=1e-3)


def test_the_gap_needs_the_grammar_of_the_samples(train):
    with pytest.raises(InputError, match="--rule-path: the gap is measured at validations; add --do_validation"):
        train("--rule-path rule_mini_mlm.txt")
    with pytest.raises(InputError, match="is not in the vocabulary"):
        train("--rule-path rule_mini_mlm.txt --do_validation")


def test_validation_intervals_differ_in_the_parts_of_training(train):
    parts = "--validation_epochs_begin 1 --validation_epochs 4 --validation_epochs_end 1 "
    parts += "--validation_begin_proportion 0.25 --validation_end_proportion 0.25 --max_steps_per_epoch 1"
    final = train(f"--do_validation --max_steps 12 {parts}")
    validated = [step for step, _, _, loss in curve(final.parent) if loss is not None]
    assert validated == [1, 2, 4, 8, 10, 11, 12]


def test_model_folders_appear_when_asked_for(train):
    final = train("--save_steps 0,3 --max_steps_per_epoch 2 --num_epochs_between_checkpoints 2 --max_steps 6")
    found = {path.name: read_json(path / "args.json") for path in final.parent.glob("step*")}
    assert sorted(found) == ["step0000000", "step0000003", "step0000004", "step0000006"]
    assert [found[name]["step"] for name in sorted(found)] == [0, 3, 4, 6]
    assert [facts["final"] for _, facts in sorted(found.items())] == [False, False, False, True]
    assert found["step0000004"]["epoch"] == 2
    last = found["step0000006"]
    assert (last["device"], last["precision"], last["attention"]) == ("cpu", "float32", "sdpa: eager")
    states = sorted(path.name for path in (final.parent / "training_state").glob("step*"))
    assert states == ["step0000004", "step0000006"]


class FakeTime:
    """A clock that goes on by `seconds` whenever it is read."""

    def __init__(self, seconds):
        self.seconds, self.time = seconds, 0.0

    def __call__(self):
        self.time += self.seconds
        return self.time


def test_the_time_schedule_follows_the_clock(train):
    flags = "--lr_schedule time --total_training_time 0.1 --warmup_proportion 0.5 --lr 1 --max_steps 1000"
    final = train(flags + " --optimizer_type sgd --gradient_clipping 0.01 --finetune_time_markers 0.5", now=FakeTime(36.0))
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert [lr for _, _, lr, _ in curve(final.parent)] == pytest.approx(expected, abs=1e-9)
    assert read_json(final / "args.json")["hours"] == pytest.approx(0.1)
    assert sorted(path.name for path in final.parent.glob("step*")) == ["step0000005", "step0000010"]


def test_the_clock_goes_on_after_an_interruption(train, monkeypatch):
    flags = "--lr_schedule time --total_training_time 0.1 --save_steps 3 --max_steps 1000"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after_saving(patch, 1)
        train(flags, now=FakeTime(36.0))
    final = train(flags, now=FakeTime(18.0))
    assert [record["seconds"] for record in read_metrics(final.parent / "metrics.jsonl")] == pytest.approx(
        [36.0 * step for step in (1, 2, 3)] + [108.0 + 18.0 * step for step in range(1, 15)]
    )


def test_early_exit_leaves_the_schedule_alone(train):
    flags = "--lr_schedule time --total_training_time 0.1 --early_exit_time_marker 0.05 --max_steps 1000"
    final = train(flags, now=FakeTime(36.0))
    steps, _, rates, _ = zip(*curve(final.parent), strict=True)
    assert steps == (1, 2, 3, 4, 5)
    assert rates[-1] == pytest.approx(5e-3 * 0.05 / 0.094)


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        ("--lr_schedule time --max_steps 11 --warmup_proportion 0.1", ["when this run ends", "at the end"]),
        ("--lr_schedule time --early_exit_time_marker 1e-9 --warmup_proportion 0.1", ["when this run ends", "at the end"]),
        ("--lr_schedule constant_step --num_warmup_steps 8", ["when this run ends", "at the end"]),
        ("--lr_schedule step --warmup_proportion 0.9 --max_steps_per_epoch 2 --num_epochs 1", ["at the end"]),
        ("--lr_schedule time --total_training_time 1e-6 --warmup_proportion 0.1", []),
        ("--lr_schedule constant_step --num_warmup_steps 7", []),
        ("--lr_schedule wsd --num_warmup_steps 0", []),
    ],
)
def test_a_run_that_ends_in_its_warmup_says_so_when_it_can_be_known_and_when_it_has(train, capsys, flags, warnings):
    train(flags)
    found = re.findall("warning: (.*), the learning rate still rises: .* of .*; give a smaller --", capsys.readouterr().out)
    assert len(found) == len(warnings) and all(map(str.startswith, found, warnings))


def test_early_stopping(train, capsys):
    flags = "--do_validation --use_early_stopping --early_stop_time 3 --early_stop_eval_loss 0.1 --max_steps_per_epoch 2"
    final = train(flags + " --validation_epochs 1 --max_steps 1000", now=FakeTime(60.0))
    assert read_json(final / "args.json")["step"] == 4
    assert "above --early_stop_eval_loss" in capsys.readouterr().out


def test_epochs_end_a_run(train):
    final = train("--num_epochs 3 --max_steps_per_epoch 2 --max_steps 1000")
    assert read_json(final / "args.json")["step"] == 6
    assert read_json(final / "args.json")["epoch"] == 3


def after_steps(monkeypatch, number, act):
    """Call act(trainer) as step `number` ends."""
    advance = trainer.Trainer.advance

    def watched(self, batch, losses):
        advance(self, batch, losses)
        if self.progress.step == number:
            act(self)

    monkeypatch.setattr(trainer.Trainer, "advance", watched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(train, monkeypatch, capsys, number):
    undisturbed = train(NO_DROPOUT, job="undisturbed")
    with monkeypatch.context() as patch:
        after_steps(patch, 3, lambda _: os.kill(os.getpid(), number))
        patch.setattr(sys, "argv", ["run_pretraining.py", "--local_rank=0", "--output_dir", "a folder"])
        state = train(NO_DROPOUT, job="stopped")
    printed = capsys.readouterr().out
    # The signal comes when step 3 is done: step 4 is begun with the knowledge, and is the last.
    assert state.name == "step0000004" and f"{number.name} at step 4; training state: {state}" in printed
    assert "go on: python run_pretraining.py --output_dir 'a folder'" in printed
    assert not list(state.parents[1].glob("step*"))
    resumed = train(NO_DROPOUT, job="stopped")
    assert_same_weights(undisturbed, resumed)
    assert curve(undisturbed.parent) == curve(resumed.parent)


def test_a_signal_in_the_last_step_leaves_a_finished_run(train, monkeypatch):
    after_steps(monkeypatch, 7, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert read_json(train() / "args.json")["final"]


def test_a_loss_that_is_not_finite_stops_the_run_at_that_step(train, monkeypatch, tmp_path):
    def spoil(self):
        self.learner.engine.module.decoder_bias.data[5] = float("nan")

    after_steps(monkeypatch, 4, spoil)
    # nothing is printed in between, and a state is due at step 5
    with pytest.raises(InputError, match=r"step 5 \(batch 4 of epoch 0\): the loss is nan; .* are kept"):
        train("--print_steps 100 --save_steps 2,5")
    assert read_latest(tmp_path / "job/training_state").name == "step0000002"
    assert [folder.name for folder in tmp_path.glob("job/step*")] == ["step0000002"]


def test_weights_that_are_not_finite_are_not_saved(train, monkeypatch, tmp_path):
    def spoil(self):
        self.learner.engine.module.decoder_bias.data[5] = float("inf")

    after_steps(monkeypatch, 4, spoil)
    with pytest.raises(InputError, match="step 4: a weight is NaN or infinite"):
        train("--save_steps 2,4")
    assert read_latest(tmp_path / "job/training_state").name == "step0000002"
    assert [folder.name for folder in tmp_path.glob("job/step*")] == ["step0000002"]


def test_a_diverging_run_stops(train):
    with pytest.raises(InputError, match=r"step \d+.*: (the loss is (nan|inf)|a weight is NaN)"):
        train("--lr 1e30 --optimizer_type sgd --gradient_clipping 0 --warmup_proportion 0")


def test_readers_are_closed_whatever_happens(train, monkeypatch):
    closed = []
    monkeypatch.setattr(Shards, "close", lambda self: closed.append(self.paths[0].name))
    train("--do_validation --max_steps 1")
    assert {"train_shard_0.hdf5", "test_shard_0.hdf5"} <= set(closed)
    closed.clear()

    def fail(_):
        raise RuntimeError

    after_steps(monkeypatch, 1, fail)
    with pytest.raises(RuntimeError):
        train("--do_validation", job="other")
    assert {"train_shard_0.hdf5", "test_shard_0.hdf5"} <= set(closed)


def test_time_left_is_shown(train, capsys):
    train("--max_steps 3")
    assert re.search(
        r"step 2/3  loss \S+  lr \S+  sentences_per_second \S+  \(\S+ s, 0:00:\d\d left\)", capsys.readouterr().out
    )


@pytest.mark.parametrize("flag", ["--activation_checkpointing", "--train_micro_batch_size_per_gpu 5"])
def test_what_changes_memory_changes_no_step(train, flag):
    plain, other = (curve(train(f"{NO_DROPOUT} {flags}", job=job).parent) for flags, job in (("", "plain"), (flag, "other")))
    assert [loss for _, loss, _, _ in plain] == pytest.approx([loss for _, loss, _, _ in other], rel=1e-5)


def test_only_training_is_compiled_in_two_graphs(train, tiny_rules, monkeypatch):
    graphs = []  # whether each is for training

    def backend(graph, _):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(MaskedLM, "compile_layers", functools.partialmethod(MaskedLM.compile_layers, backend=backend))
    torch._dynamo.reset()
    flags = "--compile --max_steps 12 --do_validation --max_steps_per_epoch 4 --validation_epochs 1"
    train(f"{flags} --rule-path {tiny_rules} --gap_sentences 20 --gap_steps 4")
    assert graphs == [True, True]  # before and after attention
