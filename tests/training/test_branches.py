"""Cooldown branches: what they train, that the trunk doesn't notice them, and that interruptions change nothing.

LONG_TESTS=1 adds further optimizers, arithmetic, signals and interruptions.
"""

import argparse
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pcfg.common.files import InputError, keyed_rng, read_json, sha256
from pretraining.data.samples import read_samples
from pretraining.evaluation.inputs import model_label
from pretraining.model import checkpoints
from pretraining.model.checkpoints import load_model, model_folders
from pretraining.report.rows import model_folders as report_folders
from pretraining.training import arguments as command_line
from pretraining.training import pretrain, trainer
from pretraining.training.batches import global_batches
from pretraining.training.metrics import read_metrics
from pretraining.training.pretrain import finished_model

LONG = bool(os.environ.get("LONG_TESTS"))
WSD = "--lr_schedule wsd --num_warmup_steps 2 "
BRANCHES = WSD + "--branch_steps 3,5 --cooldown_steps 4 --cooldown_batch_size 48 --keep_checkpoints 99 "
EPOCHS = "--save_steps 4 --do_validation --validation_epochs 1 --max_steps_per_epoch 2 --dynamic_masking "
UNDISTURBED = BRANCHES + EPOCHS + "--branch_steps 3,8 "  # the second one begins at the trunk's last step
NO_DROPOUT = "--hidden_dropout_prob 0 --attention_probs_dropout_prob 0 "


def digests(job, pattern="step*"):
    """The hashes of the weights of model folders."""
    return {str(folder.relative_to(job)): sha256(folder / "model.safetensors") for folder in sorted(job.glob(pattern))}


def curve(job, *more):
    """What must not depend on interruptions, record by record."""
    names = ("branch", "step", "samples", "loss", "lr", "validation_loss", "gap_sentences", *more)
    return [tuple(map(record.get, names)) for record in read_metrics(job / "metrics.jsonl")]


def state_tensors(job):
    """All tensors of the trunk's training states, by state."""
    states = {}
    for folder in sorted((job / "training_state").glob("step*")):
        content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
        leaves = torch.utils._pytree.tree_leaves([content["module"], content["optimizer"]])
        states[folder.name] = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return states


def stop_at(monkeypatch, branch, step, act):
    """Call `act` when a step of a branch (None: the trunk) has ended."""
    advance = trainer.Trainer.advance

    def watched(self, batches, losses):
        advance(self, batches, losses)
        if (self.trunk.progress.step if self.trunk else None, self.progress.step) == (branch, step):
            act()

    monkeypatch.setattr(trainer.Trainer, "advance", watched)


@pytest.fixture(scope="module")
def undisturbed(train_in, tmp_path_factory):
    """The folder of a run with the flags `UNDISTURBED`; tests leave it as it is."""
    return train_in(tmp_path_factory.mktemp("undisturbed"), UNDISTURBED).parent


@pytest.mark.parametrize(
    "flags",
    [
        EPOCHS,
        "--save_steps 4 --optimizer_type lamb --dynamic_masking",
        "--save_steps 4 --optimizer_type sgd --bf16",
    ][: 3 if LONG else 1],
)
def test_the_trunk_is_the_same_with_and_without_branches(train, undisturbed, flags):
    plain = train(WSD + flags + " --keep_checkpoints 99", job="plain").parent
    branched = undisturbed if flags == EPOCHS else train(BRANCHES + flags, job="branched").parent
    trunk = digests(branched)
    steps = {3, 8} if flags == EPOCHS else {3, 5}
    cooled = {name: trunk.pop(name) for name in (f"step000000{step}-cooled" for step in steps)}
    assert sorted(trunk) == [f"step000000{step}" for step in sorted({4, 8} | steps)]
    assert len({*trunk.values(), *cooled.values()}) == len(trunk) + 2
    plain_weights = digests(plain)
    assert {name: trunk[name] for name in plain_weights} == plain_weights
    assert [record for record in curve(branched) if record[0] is None] == curve(plain)
    one, other = state_tensors(plain), state_tensors(branched)
    assert one.keys() <= other.keys() and len(one) >= 2
    for name, tensors in one.items():
        assert len(tensors) == len(other[name]) > 40
        assert all(torch.equal(first, second) for first, second in zip(tensors, other[name], strict=True))
    assert not list((branched / "training_state").glob("branch*"))


@pytest.mark.parametrize("flags", ["--fp16", "--zero_stage 2"][: 2 if LONG else 1])
def test_with_zero_and_in_float16_the_trunk_is_the_same_too(train, monkeypatch, flags):
    if flags == "--fp16":
        monkeypatch.setattr(pretrain, "precision", lambda *_: "float16")
        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        types = [torch.float32, torch.float16, torch.bfloat16]
        monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: types)
    plain = train(f"{WSD} {flags} --max_steps 5", job="plain")
    branched = train(f"{BRANCHES} {flags} --max_steps 5 --branch_steps 3 --cooldown_steps 2", job="branched")
    assert digests(plain.parent)["step0000005"] == digests(branched.parent)["step0000005"]
    assert [record for record in curve(branched.parent) if record[0] is None] == curve(plain.parent)


def test_a_branch_is_sgd_on_its_own_samples_with_a_rate_that_falls_to_zero(train, tiny_samples, naive_loss):
    """Against a loop written out: momentum from the trunk on, batches of another size from the first shard not begun."""
    flags = "--optimizer_type sgd --sgd_momentum 0.5 --weight_decay 0 --gradient_clipping 0 --lr 0.4 "
    final = train(BRANCHES + flags + NO_DROPOUT + "--max_steps 5")
    job = final.parent
    assert final.name == "step0000005"
    content = torch.load(job / "training_state/step0000003/mp_rank_00_model_states.pt", weights_only=True)
    momentum = [content["optimizer"]["state"][index]["momentum_buffer"] for index in range(len(content["optimizer"]["state"]))]
    model = load_model(job / "step0000003").train()
    parameters = [p for p in model.parameters() if p.ndim >= 2] + [p for p in model.parameters() if p.ndim < 2]
    shards = sorted(tiny_samples.glob("train_shard_*.hdf5"))
    samples = read_samples(shards[1 % len(shards)])
    stream = int(keyed_rng(42, "branch", 3).integers(1 << 63))
    records = [record for record in read_metrics(job / "metrics.jsonl") if record.get("branch") == 3]
    for k, rows in enumerate(global_batches(len(samples), 48, stream, 1, "")[:4]):
        loss = naive_loss(model, samples, rows)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, buffer, gradient in zip(parameters, momentum, gradients, strict=True):
            buffer.mul_(0.5).add_(gradient)
            parameter.data -= 0.4 * (1 - (k + 1) / 4) * buffer
        assert records[k]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert (records[k]["step"], records[k]["samples"]) == (4 + k, 3 * 32 + 48 * (k + 1))
        assert records[k]["lr"] == pytest.approx(0.4 * (1 - (k + 1) / 4))
    cooled = load_model(job / "step0000003-cooled").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(cooled[name], tensor, rtol=1e-4, atol=1e-6)
    facts = read_json(job / "step0000003-cooled/args.json")
    assert (facts["step"], facts["cooled"], facts["branch"], facts["cooldown_steps"], facts["final"]) == (3, True, 3, 4, False)
    assert (facts["samples_seen"], facts["arguments"]["train_batch_size"]) == (3 * 32 + 4 * 48, 32)
    assert "cooled" not in read_json(job / "step0000003/args.json")
    assert read_json(final / "args.json")["branches"] == [3, 5]


def test_branches_have_dropout_masks_and_labelled_sentences_of_their_own(train, labelled, monkeypatch):
    from pretraining.training.adversarial import AdversarialTerm

    rows, keys = {}, []
    original, generator = AdversarialTerm.rows, torch.default_generator

    def noting(self, step):
        drawn = original(self, step)
        rows[self._seed, step] = drawn.tolist()
        return drawn

    monkeypatch.setattr(AdversarialTerm, "rows", noting)
    noted = SimpleNamespace(manual_seed=lambda number: keys.append(number) or generator.manual_seed(number))
    monkeypatch.setattr(torch, "default_generator", noted)
    term = f"--adversarial_weight 1 --adversarial_file {labelled} --adversarial_batch_size 20"
    train(f"{BRANCHES} --dynamic_masking --max_steps 5 --cooldown_steps 2 {term}")
    streams = [42, *(int(keyed_rng(42, "branch", step).integers(1 << 63)) for step in (3, 5))]
    assert sorted(rows) == sorted([(42, step) for step in range(5)] + [(s, step) for s in streams[1:] for step in range(2)])
    assert len({tuple(drawn) for drawn in rows.values()}) == 9
    assert len(set(keys)) == len(keys) == 2 * 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT][: 2 if LONG else 1])
def test_a_signal_in_a_branch_saves_a_state_of_it(train, undisturbed, monkeypatch, capsys, number):
    for branch, step in ((3, 1), (8, 2)):
        with monkeypatch.context() as patch:
            stop_at(patch, branch, step, lambda: os.kill(os.getpid(), number))
            state = train(UNDISTURBED, job="stopped")
        assert state.parts[-2:] == (f"branch000000{branch}", f"step000000{step + 1}")
        text = f"{number.name} at step {step + 1} of the branch of step {branch}; training state: {state}\ngo on: python"
        assert text in capsys.readouterr().out
    resumed = train(UNDISTURBED, job="stopped").parent
    assert "branch of step 8, from its step 3" in capsys.readouterr().out
    assert digests(resumed) == digests(undisturbed) and len(digests(resumed)) == 5
    assert curve(resumed) == curve(undisturbed)


@pytest.mark.parametrize("optimizer", ["", "--optimizer_type lamb"][: 2 if LONG else 1])
def test_a_crash_in_a_branch_or_after_it_changes_nothing(train, undisturbed, monkeypatch, optimizer):
    flags = UNDISTURBED + optimizer
    if optimizer:
        undisturbed = train(flags, job="undisturbed").parent

    def die():
        raise KeyboardInterrupt

    for branch, step in ((3, 1), (3, 3), (None, 7), (8, 1)) if LONG else ((3, 3), (None, 7)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, branch, step, die)
            train(flags, job="crashed")
    resumed = train(flags, job="crashed").parent
    assert digests(resumed) == digests(undisturbed)
    assert curve(resumed) == curve(undisturbed)


def test_a_damaged_state_of_a_branch_is_passed_over(train, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        state = train(UNDISTURBED, job="stopped")
    (state / "mp_rank_00_model_states.pt").write_bytes(b"not a checkpoint")
    resumed = train(UNDISTURBED, job="stopped").parent
    assert f"warning: {state}" in capsys.readouterr().out
    assert digests(resumed) == digests(undisturbed) and curve(resumed) == curve(undisturbed)


def test_a_run_is_complete_when_all_branches_are(train, undisturbed, tmp_path, capsys):
    final = shutil.copytree(undisturbed, tmp_path / "job") / "step0000008"
    options = argparse.Namespace(**vars(argparse_namespace(final)) | {"output_dir": str(tmp_path)})
    assert finished_model(options) == final
    damaged = final.parent / "step0000003-cooled/model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    assert finished_model(options) is None and "damaged" in capsys.readouterr().out
    # Its trunk's state is long gone: nothing is trained again behind the user's back.
    with pytest.raises(InputError, match="step0000003-cooled: missing, and the trunk is at step 8, after it; leave 3 out"):
        train(UNDISTURBED)
    damaged.write_bytes(content)
    shutil.rmtree(final)
    assert train(UNDISTURBED) == final
    with pytest.raises(InputError, match=r"other arguments \(cooldown_steps was 4, now 1\)"):
        train(UNDISTURBED + "--cooldown_steps 1")
    again = train(UNDISTURBED + "--cooldown_steps 1 --overwrite")
    assert read_json(again.parent / "step0000008-cooled/args.json")["cooldown_steps"] == 1


def argparse_namespace(folder):
    """The options of the run that saved a model folder."""
    parser = command_line.build_parser("")
    return command_line.parse_with_config(parser, ["--config", str(folder / "args.json")])


def test_searches_take_cooled_models_and_verify_takes_all(undisturbed, capsys):
    job = undisturbed
    assert [folder.name for folder in model_folders(job.parent)] == ["step0000003-cooled", "step0000004", "step0000008-cooled"]
    assert report_folders(job) == model_folders(job)
    assert model_folders(job / "step0000003") == report_folders(job / "step0000003") == [job / "step0000003"]
    assert model_label(job / "step0000003-cooled") == "job step 3, cooled"
    capsys.readouterr()
    checkpoints.main(["verify", str(job)])
    assert capsys.readouterr().out.count("weights") == 5


GAP = "--rule-path {} --gap_sentences 20 --gap_steps 2 "


def test_the_gap_is_measured_every_so_many_steps_and_at_saved_models(train, tiny_rules):
    flags = BRANCHES + GAP.format(tiny_rules) + "--branch_steps 3 --max_steps 5 --save_steps 0"
    final = train(flags)
    records = read_metrics(final.parent / "metrics.jsonl")
    measured = [(record.get("branch"), record["step"]) for record in records if "gap_sentences" in record]
    assert measured == [(None, 0), (None, 2), (None, 3), (3, 7), (None, 4), (None, 5)]


def test_a_run_stops_below_the_target_and_cools_down(train, tiny_rules, monkeypatch, capsys):
    gap = GAP.format(tiny_rules)
    measured = [r for r in read_metrics(train(WSD + gap, job="all").parent / "metrics.jsonl") if "gap_sentences" in r]
    ends = {record["step"]: record["gap_sentences"] + 1.96 * record["gap_sentences_se"] for record in measured}
    assert min(ends.values()) == ends[8] < ends[6] < ends[4]  # it learns
    flags = f"{WSD} {gap} --cooldown_steps 3 --max_steps 100 --target_gap {(ends[4] + ends[6]) / 2}"
    final = train(flags, job="target")
    assert final.name == "step0000006" and re.search("finished: .*below --target_gap", capsys.readouterr().out)
    assert sorted(digests(final.parent)) == ["step0000006", "step0000006-cooled"]
    assert read_json(final / "args.json")["branches"] == [6] and finished_model(argparse_namespace(final)) == final
    if LONG:
        with monkeypatch.context() as patch:
            stop_at(patch, 6, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train(flags, job="stopped")
        resumed = train(flags, job="stopped").parent
        assert digests(resumed) == digests(final.parent) and curve(resumed) == curve(final.parent)
    stopped = train(f"{gap} --max_steps 100 --lr_schedule constant_step --target_gap 9", job="plain")
    assert [folder.name for folder in stopped.parent.glob("step*")] == ["step0000002"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--branch_steps 4", "--branch_steps: --lr_schedule step has no branches; give --lr_schedule wsd"),
        ("--cooldown_steps 4", "--cooldown_steps: --lr_schedule step has no branches"),
        ("--cooldown_batch_size 4", "--cooldown_batch_size: --lr_schedule step has no branches"),
        (WSD + "--branch_steps 4", "--branch_steps: of how many steps are the branches\\? add --cooldown_steps"),
        (WSD + "--cooldown_steps 4", "--cooldown_steps: there are no branches; add --branch_steps or --target_gap"),
        (WSD + "--branch_steps 4,9 --cooldown_steps 4", "--branch_steps: 9 is after --max_steps 8; leave it out"),
        (WSD + "--curve exp", "--curve exp: with --lr_schedule wsd the rate is constant; leave it out"),
        ("--gap_steps 2", "--gap_steps 2: the gap needs the samples' grammar; add --rule-path"),
        ("--target_gap 0.1", "--target_gap 0.1: when is the gap measured\\? add --gap_steps"),
        ("--target_gap 0.1 --rule-path rule_mini_mlm.txt --do_validation", "--target_gap 0.1: when is the gap measured"),
        (WSD + "--branch_steps 4 --cooldown_steps 2 --cooldown_batch_size 5000", "fewer than --cooldown_batch_size 5000"),
    ],
)
def test_flags_that_do_not_go_together(train, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train(flags)
    assert not list(tmp_path.glob("job/step*"))


def test_without_branches_their_flags_are_the_same_run(train):
    """States of earlier versions have none of these flags."""
    new = read_json(train() / "args.json")["arguments"]
    old = {name: value for name, value in new.items() if not re.match("branch|cooldown|gap_steps|target", name)}
    assert len(new) - len(old) == 5 and command_line.differences(old, new) == ""


def test_sgd_at_a_large_rate_without_clipping(train):
    flags = "--optimizer_type sgd --sgd_momentum 0 --gradient_clipping 0 --weight_decay 0 "
    job = train(flags + WSD + NO_DROPOUT + "--lr 0.4 --max_steps 30 --print_steps 1").parent
    losses = [record["loss"] for record in read_metrics(job / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < losses[0] - 0.2
    with pytest.raises(InputError, match=r"step \d+.*(loss is (nan|inf)|NaN or infinite); try a smaller --lr, .* are kept"):
        train(flags + WSD + "--lr 1e6 --max_steps 60", job="diverging")


def test_branches_of_several_seeds_are_those_of_a_run_without_interruption(train, monkeypatch):
    """Of members that are stacked; one of them diverges in the first branch, and goes on in the trunk."""
    flags = f"{BRANCHES} --max_steps 6 --hidden_dropout_prob 0.1 --seeds 1,2,3 --dynamic_masking "
    flags += "" if LONG else "--cooldown_steps 2 "
    undisturbed = train(flags, job="undisturbed").parents[1]
    assert len(digests(undisturbed, "seed2/*")) == 5
    if LONG:
        plain = train(WSD + "--max_steps 6 --seeds 1,2,3 --dynamic_masking", job="plain").parents[1]
        assert digests(plain, "seed*/step0000006") == digests(undisturbed, "seed*/step0000006")
        assert [record for record in curve(undisturbed, "seed") if record[0] is None] == curve(plain, "seed")
        with monkeypatch.context() as patch:
            stop_at(patch, 3, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train(flags, job="stopped")
        resumed = train(flags, job="stopped").parents[1]
        for seed in (1, 2, 3):
            assert digests(resumed, f"seed{seed}/*") == digests(undisturbed, f"seed{seed}/*")
        assert curve(resumed, "seed") == curve(undisturbed, "seed")

    advance = trainer.Trainer.advance

    def spoil(self, batches, losses):
        if self.trunk and self.trunk.progress.step == 3 and self.progress.step == 1:
            losses["loss"][1] = float("nan")
        advance(self, batches, losses)

    monkeypatch.setattr(trainer.Trainer, "advance", spoil)
    message = "seed 2: step 2 of the branch of step 3 .*: the loss is nan. The other seeds are complete"
    with pytest.raises(InputError, match=message):
        train(flags, job="spoilt")
    job = undisturbed.with_name("spoilt")
    names = [folder.name for folder in sorted(job.glob("seed2/*"))]
    assert names == ["step0000003", "step0000005", "step0000005-cooled", "step0000006"]
    for seed in (1, 3):
        assert digests(job, f"seed{seed}/*") == digests(undisturbed, f"seed{seed}/*")
    with pytest.raises(InputError, match=message):
        finished_model(argparse_namespace(job / "seed1/step0000006"))
