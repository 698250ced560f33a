"""Members of a stack against models and runs of their own. LONG_TESTS=1 adds optimizers and steps."""

import argparse
import itertools
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pcfg.common.files import InputError, read_json, sha256
from pretraining.data.samples import Samples
from pretraining.data.vocabulary import Vocabulary
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model
from pretraining.model.config import ModelConfig
from pretraining.training import arguments as command_line
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.batches import IGNORED, GlobalBatch, Packing
from pretraining.training.learner import Member
from pretraining.training.metrics import read_metrics
from pretraining.training.pretrain import finished_model
from pretraining.training.stacked import Stack, StackedLearner, is_worth_stacking, stacked_micro_batches
from tests.training.conftest import NO_DROPOUT, assert_same_weights, crash_after_saving, weights

LONG = bool(os.environ.get("LONG_TESTS"))
DROPOUT = "--hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1"
SEEDS = "--seeds 3,4,5"
STEPS = 20 if LONG else 8
WSD = f"--lr_schedule wsd --num_warmup_steps 2 --branch_steps {STEPS // 2} --cooldown_steps 5 --cooldown_batch_size 48"


def distance(folder, other):
    """Largest difference of two models' weights."""
    one, two = weights(folder), weights(other)
    return max((one[name] - two[name]).abs().max().item() for name in one)


def ragged_samples(count, length, masks, vocab_size=21):
    """Samples of 3 to `length` tokens with 1 to `masks` masks each."""
    rng = np.random.default_rng(masks)
    lengths = rng.integers(3, length + 1, count)
    is_token = np.arange(length) < lengths[:, None]
    ids = np.where(is_token, rng.integers(5, vocab_size, (count, length)), 0).astype(np.int32)
    positions, words = np.zeros((2, count, masks), np.int32)
    for row, tokens in enumerate(lengths):
        number = min(int(rng.integers(1, masks + 1)), tokens - 2)
        positions[row, :number] = np.sort(rng.choice(np.arange(1, tokens - 1), number, replace=False))
        words[row, :number] = rng.integers(5, vocab_size, number)
    mask = is_token.astype(np.int8)
    return Samples(ids, mask, np.zeros_like(mask), positions, words)


def small_models(members, length=12, **fields):
    shape = {"vocab_size": 21, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"max_position_embeddings": length, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return [MaskedLM(ModelConfig(**{**shape, **fields})) for _ in range(members)]


@pytest.fixture
def learner():
    """Makes a learner of small models, with the flags' optimizer."""

    def make(flags="", members=3, is_stacked=True):
        fixed = "--dataset_path x --tokenizer_name x --output_dir x --train_micro_batch_size_per_gpu 16"
        options = command_line.build_parser("").parse_args([*fixed.split(), *flags.split()])
        return StackedLearner(options, small_models(members), torch.device("cpu"), is_stacked)

    return make


def global_batches_of(samples, members, size=24):
    rng = np.random.default_rng(5)
    return [GlobalBatch(samples, rng.permutation(len(samples))[:size], 0, is_last=False) for _ in range(members)]


def members_of(number):
    return [Member(seed, seed, None, None, None) for seed in range(number)]


@pytest.mark.parametrize("packing", [Packing(0), Packing(20), Packing(1e6)])
@pytest.mark.parametrize("masks", [1, 3, 9])
@pytest.mark.parametrize("fields", [{}, {"encoder_ln_mode": "post-ln", "layer_norm_type": "rms_norm"}, {"attention": "eager"}])
def test_losses_and_gradients_are_those_of_each_model_alone(masks, fields, packing, naive_loss):
    samples = ragged_samples(60, 12, masks)
    alone = small_models(3, **fields)
    stack = Stack(small_models(3, **fields))
    batches = global_batches_of(samples, 3)
    total = torch.zeros(3)
    for part in stacked_micro_batches(batches, 10, packing):
        losses = stack.masked_losses(part)
        losses.sum().backward()
        total += losses.detach()
    for index, (model, batch) in enumerate(zip(alone, batches, strict=True)):
        number = np.count_nonzero(samples.masked_lm_positions[batch.rows])
        loss = naive_loss(model, samples, batch.rows) * number
        loss.backward()
        assert total[index].item() == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            own = stack.models[index].get_parameter(name).grad
            torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-4)


def test_micro_batches_hold_each_members_rows_once_and_cut_all_at_the_same_places():
    samples = ragged_samples(80, 12, 3)
    batches = global_batches_of(samples, 4)
    parts = stacked_micro_batches(batches, 7, Packing(10))
    for index, batch in enumerate(batches):
        expected, actual = [], []
        for row in batch.rows:
            tokens = samples.input_mask[row].sum()
            expected.append(samples.input_ids[row, :tokens].tolist())
        masks = 0
        for part in parts:
            mask = torch.ones_like(part.input_ids) if part.input_mask is None else part.input_mask
            sizes = [length for number, length, _ in part.blocks for _ in range(number)]
            rows = zip(part.input_ids[index].split(sizes), mask[index].split(sizes), strict=True)
            actual += [row[: int(own.sum())].tolist() for row, own in rows]
            masks += int((part.labels[index] != IGNORED).sum())
        assert sorted(actual) == sorted(expected)
        assert masks == np.count_nonzero(samples.masked_lm_positions[batch.rows])
    assert max(sum(number for number, *_ in part.blocks) for part in parts) <= 7


def test_a_stack_of_one_length_has_no_mask_and_no_ignored_label():
    samples = ragged_samples(40, 3, 1)
    (part,) = stacked_micro_batches(global_batches_of(samples, 2), 32, Packing())
    assert part.input_mask is None
    assert (part.labels != IGNORED).all()


@pytest.mark.parametrize(
    ("optimizer", "value", "is_stacked"),
    [
        ("adamw", float("nan"), True),
        ("adamw", 1e30, True),
        ("adamw", float("nan"), False),
        ("sgd", 1e30, True),
        ("lamb", float("nan"), True),
        ("adafactor", float("nan"), True),
    ],
)
def test_a_members_exploding_gradient_leaves_the_others_alone_bit_for_bit(learner, optimizer, value, is_stacked):
    samples = ragged_samples(60, 12, 3)
    batches = global_batches_of(samples, 3)
    results = []
    for explodes in (False, True):
        one = learner(f"--optimizer_type {optimizer} --lr 1e-2 --gradient_clipping 1.0", is_stacked=is_stacked)
        for step in range(3):
            one.accumulate(step, batches, members_of(3))
            if explodes and step == 1:
                one.models()[1].decoder_bias.grad.fill_(value)
            one.step(1e-2)
        results.append([model.state_dict() for model in one.models()])
    for index in (0, 2):
        assert all(torch.equal(results[0][index][name], results[1][index][name]) for name in results[0][index])
    assert not torch.equal(results[0][1]["decoder_bias"], results[1][1]["decoder_bias"])


@pytest.mark.parametrize("flags", ["--optimizer_type adamw", "--optimizer_type sgd --sgd_momentum 0", "--optimizer_type lamb"])
def test_loading_restores_a_learner_that_has_trained_on_bit_for_bit(learner, flags, tmp_path):
    batches = global_batches_of(ragged_samples(60, 12, 3), 3)
    one = learner(flags)

    def train(steps):
        for step in range(steps):
            one.accumulate(step, batches, members_of(3))
            one.step(1e-2)
        return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in one.models()]

    train(2)
    one.save(tmp_path)
    first = train(3)
    one.load(tmp_path, {"stacked.pt": sha256(tmp_path / "stacked.pt")})
    for old, new in zip(first, train(3), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_adversarial_terms_are_those_of_each_model_alone(labelled, tiny_data):
    vocabulary = Vocabulary.read(tiny_data / "vocab.txt")
    fields = {"vocab_size": vocabulary.size, "length": 10}
    alone, stack = small_models(2, **fields), Stack(small_models(2, **fields))
    terms = [AdversarialTerm(labelled, 20, 1e-3, vocabulary, 10, seed) for seed in (3, 4)]
    losses = stack.adversarial_losses(terms, step=7)
    losses.sum().backward()
    for index, (model, term) in enumerate(zip(alone, terms, strict=True)):
        loss = term.loss(model, 7)
        loss.backward()
        assert losses[index].item() == pytest.approx(loss.item(), rel=1e-5)
        own = stack.models[index].embeddings.words.weight.grad
        torch.testing.assert_close(own, model.embeddings.words.weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer_type sgd --lr 0.1 --gradient_clipping 0 --dynamic_masking WSD",
        "--optimizer_type adamw ADVERSARIAL --gradient_clipping 0.5",
        "--optimizer_type adamw --lr_schedule step",
        "--optimizer_type lamb",
    ][: 4 if LONG else 2],
)
def test_members_equal_the_runs_of_their_own_seeds(train, labelled, flags):
    adversarial = f"--adversarial_weight 0.1 --adversarial_file {labelled} --adversarial_batch_size 20"
    flags = f"{flags.replace('ADVERSARIAL', adversarial).replace('WSD', WSD)} {NO_DROPOUT} --max_steps {STEPS}"
    name = f"step{STEPS:07d}"
    final = train(f"{flags} {SEEDS}", job="stacked")
    assert final == final.parents[1] / "seed3" / name
    assert read_json(final / "args.json")["stacked"] == {"seeds": [3, 4, 5], "vmap": True}
    job = final.parents[1]
    alone = train(f"{flags} --seed 5", job="alone")
    assert (job / f"seed5/step{STEPS // 2:07d}-cooled").exists() == ("wsd" in flags)
    for folder in (alone, *alone.parent.glob("*-cooled")):
        assert distance(folder, job / "seed5" / folder.name) < 1e-4
    assert distance(alone, job / "seed4" / name) > 1e-2
    facts = read_json(job / "seed5" / name / "args.json")
    assert (facts["seed"], facts["step"]) == (5, STEPS)
    own = [record for record in read_metrics(job / "metrics.jsonl") if record["seed"] == 5]
    for record, other in zip(own, read_metrics(alone.parent / "metrics.jsonl"), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_members_in_turn_are_the_runs_of_their_seeds_with_dropout_too(train, labelled):
    flags = f"{DROPOUT} --max_steps {STEPS // 2} --lr 1e-3"
    flags += f" --adversarial_weight 0.1 --adversarial_file {labelled} --adversarial_batch_size 20"
    final = train(f"--seeds 3,4 {flags}", job="turns")  # two members are never stacked
    assert read_json(final / "args.json")["stacked"] == {"seeds": [3, 4], "vmap": False}
    alone = train(f"--seed 4 {flags}", job="alone")
    assert distance(alone, final.parents[1] / "seed4" / final.name) < 1e-5


def test_dropout_differs_between_members_and_steps(learner):
    one = learner("--lr 0.1")
    for module in one._stack.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = global_batches_of(ragged_samples(60, 12, 1), 1)[0]
    for model in one.models()[1:]:
        model.load_state_dict(one.models()[0].state_dict())
    losses = [one.accumulate(step, [batch] * 3, members_of(3))["loss"].tolist() for step in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 6


def test_a_killed_run_resumes_bit_for_bit(train, monkeypatch):
    steps = 8 if LONG else 6
    flags = f"{SEEDS} {DROPOUT} --dynamic_masking --max_steps_per_epoch 3 --save_steps 3,5 --max_steps {steps}"
    undisturbed = train(flags, job="undisturbed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after_saving(patch, 2)
        train(flags, job="killed")
    resumed = train(flags, job="killed")
    for seed in (3, 4, 5):
        name = f"seed{seed}/step000000{steps}"
        assert_same_weights(undisturbed.parents[1] / name, resumed.parents[1] / name)
    losses = [
        [record["loss"] for record in read_metrics(final.parents[1] / "metrics.jsonl")] for final in (undisturbed, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps * 3


def test_members_start_from_their_own_models_and_validate_alone(train):
    first = train(f"{SEEDS} {NO_DROPOUT} --max_steps 2", job="first").parents[1]
    flags = f"{SEEDS} {NO_DROPOUT} --save_steps 0 --max_steps 2 --do_validation"
    second = train(f"{flags} --model_name_or_path {first}/seed{{seed}}/step0000002", job="second").parents[1]
    records = {record["seed"]: record for record in read_metrics(second / "metrics.jsonl") if "validation_loss" in record}
    assert len({record["validation_loss"] for record in records.values()}) == 3
    facts = read_json(second / "seed4/step0000000/args.json")
    assert set(facts["initial_weights"]) == {"seed3", "seed4", "seed5"}
    for seed in (3, 4, 5):
        assert_same_weights(first / f"seed{seed}/step0000002", second / f"seed{seed}/step0000000")


def test_a_diverged_member_is_left_out_and_named(train, capsys):
    first = train(f"{SEEDS} {NO_DROPOUT} --max_steps 1", job="first").parents[1]
    broken = first / "seed4/step0000001"
    stored = weights(broken)
    save_file({name: tensor * 1e30 for name, tensor in stored.items()}, broken / "model.safetensors")
    facts = read_json(broken / "args.json")
    del facts["files"]
    (broken / "args.json").write_text(json.dumps(facts))
    flags = f"{SEEDS} {NO_DROPOUT} --max_steps 4 --save_steps 2 --model_name_or_path {first}/seed{{seed}}/step0000001"
    with pytest.raises(InputError, match="seed 4: step 1 .*the loss is nan.* The other seeds are complete"):
        train(flags, job="job")
    assert "warning: seed 4: step 1" in capsys.readouterr().out
    job = first.parent / "job"
    assert {path.name for path in job.glob("seed*/step*")} == {"step0000002", "step0000004"}
    assert {path.parent.name for path in job.glob("seed*/step0000004")} == {"seed3", "seed5"}
    facts = read_json(job / "seed3/step0000004/args.json")
    with pytest.raises(InputError, match="seed 4"):  # a rerun of the same command says so again, and trains nothing
        finished_model(argparse.Namespace(**facts["arguments"]))
    assert {record["seed"] for record in read_metrics(job / "metrics.jsonl")} == {3, 5}


def test_a_run_is_complete_only_if_every_member_is(train):
    final = train(f"{SEEDS} {NO_DROPOUT} --max_steps 1")
    options = argparse.Namespace(**read_json(final / "args.json")["arguments"])
    assert finished_model(options) == final
    (final.parents[1] / "seed5/step0000001/args.json").unlink()
    assert finished_model(options) is None
    assert load_model(train(f"{SEEDS} {NO_DROPOUT} --max_steps 1")).config.hidden_size == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bf16", "--bf16: not with --seeds"),
        ("--fp16", "--fp16: not with --seeds"),
        ("--zero_stage 1", "--zero_stage: not with --seeds"),
        ("--compile", "--compile: not with --seeds"),
        ("--activation_checkpointing", "--activation_checkpointing: not with --seeds"),
        ("--attention apex", "--attention apex"),
        ("--project_name p", "--project_name"),
        ("--seeds ,", "no seed is given"),
    ],
)
def test_what_a_stack_cannot_do_is_refused_in_one_line(train, flags, message):
    with pytest.raises(InputError, match=message) as error:
        train(f"{SEEDS} {flags}")
    assert "\n" not in str(error.value)


def test_other_seeds_or_a_run_of_one_seed_cannot_go_on_from_a_state(train):
    state = train(f"{SEEDS} --max_steps 1", job="first").parents[1] / "training_state"
    for seeds in ("--seeds 3,4,6", "--seed 3"):
        with pytest.raises(InputError, match="seeds was"):
            train(f"{seeds} --max_steps 2 --load_training_checkpoint {state}", job="second")


def test_the_rule_of_stacking():
    shape = {"vocab_size": 21, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 6}
    worth = {
        (width, members): is_worth_stacking(
            ModelConfig(hidden_size=width, intermediate_size=4 * width, **shape), members, tokens=192
        )
        for width, members in itertools.product((16, 32, 64, 128), (1, 2, 4, 8))
    }
    assert {key for key, value in worth.items() if value} == {(16, 4), (32, 4), (16, 8), (32, 8), (64, 8)}
