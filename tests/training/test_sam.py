"""SAM against a naive reference: a moved copy of the model, and the gradient there. LONG_TESTS=1 adds variants and steps."""

import argparse
import os

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from pcfg.common.files import InputError, read_json
from pretraining.model.checkpoints import load_model
from pretraining.training import pretrain
from pretraining.training.metrics import read_metrics
from pretraining.training.sam import ascent
from tests.training.conftest import NO_DROPOUT, PLAIN_SGD, assert_same_weights, crash_after_saving, weights

LONG = bool(os.environ.get("LONG_TESTS"))


def losses(job):
    return [(record["step"], record["loss"]) for record in read_metrics(job / "metrics.jsonl")]


def test_members_climb_on_their_own():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2), (3, 5), (3,)]
    stack = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    for gradient in gradients:
        gradient[2] *= 1e6
    before = [tensor.clone() for tensor in stack]
    with ascent(stack, gradients, 0.3, per_member=True):
        for member in range(3):
            single = [tensor[member].clone() for tensor in before]
            with ascent(single, [gradient[member] for gradient in gradients], 0.3):
                for tensor, own in zip(stack, single, strict=True):
                    torch.testing.assert_close(tensor[member], own)
            length = sum((new[member] - old[member]).square().sum() for new, old in zip(stack, before, strict=True)).sqrt()
            assert length.item() == pytest.approx(0.3, rel=1e-5)
    assert all(map(torch.equal, stack, before))


def test_a_gradient_of_zero_moves_nothing_and_an_error_restores_the_weights():
    weight = torch.tensor([0.1, 0.7])
    with ascent([weight], [torch.zeros(2)], 1.0):
        assert weight.tolist() == pytest.approx([0.1, 0.7])
    with pytest.raises(KeyboardInterrupt), ascent([weight], [torch.ones(2)], 1.0):
        assert weight[0] > 0.8
        raise KeyboardInterrupt
    assert torch.equal(weight, torch.tensor([0.1, 0.7]))


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ("--train_micro_batch_size_per_gpu 3", 0.0),
        ("--adversarial_weight 3 --adversarial_file {file} --adversarial_batch_size 20", 3.0),
        ("--train_micro_batch_size_per_gpu 32 --activation_checkpointing", 0.0),
    ][: 3 if LONG else 2],
)
def test_a_step_is_the_gradient_after_the_ascent(train, labelled, naive_sam, naive_total, relative_error, flags, weight):
    flags = flags.format(file=labelled)
    final = train(f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --save_steps 0 --sam_rho 0.5 {flags}")
    before = load_model(final.parent / "step0000000").train()
    loss, _ = naive_sam(before, batch_size=32, weight=weight, rho=0.5)
    (record,) = read_metrics(final.parent / "metrics.jsonl")
    assert record["loss"] == pytest.approx(loss, rel=1e-6)  # at w
    assert relative_error(before, load_model(final)) < 1e-5
    before.zero_grad()
    naive_total(before, batch_size=32, weight=weight)
    assert relative_error(before, load_model(final)) > 0.05  # another gradient than that at w


def test_bfloat16(train, naive_sam, relative_error, monkeypatch):
    monkeypatch.setattr(pretrain, "precision", lambda *_: "bfloat16")
    final = train(f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --save_steps 0 --sam_rho 0.5 --bf16")
    before = load_model(final.parent / "step0000000").train()
    naive_sam(before, batch_size=32, weight=0.0, rho=0.5)
    assert relative_error(before, load_model(final)) < 0.03


@pytest.mark.parametrize("flags", ["", "--seeds 3,4,5", "--seeds 3,4"][: 3 if LONG else 2])
def test_both_passes_have_the_same_masks(train, flags):
    """With dropout everywhere; where the generator stands after a module tells of attention's masks, and of stacked ones."""
    events = []

    def note(module, _, output):
        if isinstance(module, nn.Dropout):
            events.append((torch.get_rng_state(), torch.zeros(1) if flags else output == 0))

    hook = register_module_forward_hook(note)
    try:
        train(f"--max_steps 2 --sam_rho 0.1 --hidden_dropout_prob 0.3 --attention_probs_dropout_prob 0.3 {flags}")
    finally:
        hook.remove()
    step = len(events) // 2
    assert step > 20
    for first, second in zip(events[: step // 2], events[step // 2 : step], strict=True):
        assert all(map(torch.equal, first, second))
    assert not torch.equal(events[0][0], events[step][0])


def test_members_equal_the_runs_of_their_own_seeds(train):
    flags = f"{NO_DROPOUT} --sam_rho 0.5 --max_steps {8 if LONG else 4} --save_steps 0"
    alone, without = (weights(train(f"{flags} {own} --seed 4", job=f"alone{own[-1:]}")) for own in ("", "--sam_rho 0"))
    for seeds, is_stacked in (("3,4,5", True), ("3,4", False)):
        final = train(f"{flags} --seeds {seeds}", job=f"seeds{seeds}")
        assert read_json(final / "args.json")["stacked"]["vmap"] == is_stacked
        member = weights(final.parents[1] / "seed4" / final.name)
        distances = [max((member[name] - other[name]).abs().max() for name in member) for other in (alone, without)]
        assert distances[0] < 1e-4 < 1e-3 < distances[1]


@pytest.mark.parametrize("flags", ["", "--seeds 3,4,5"])
def test_weights_are_restored_bit_for_bit(train, flags):
    final = train(f"--lr 0 --weight_decay 0 --max_steps 3 --save_steps 0 --sam_rho 0.5 {flags}")
    assert_same_weights(final.parent / "step0000000", final)


def test_clipping_is_of_the_second_gradient(train):
    final = train(f"{PLAIN_SGD} --gradient_clipping 0.001 --max_steps 1 --save_steps 0 --sam_rho 0.5")
    before, after = weights(final.parent / "step0000000"), weights(final)
    change = torch.cat([(after[name] - before[name]).double().flatten() for name in after])
    assert change.norm().item() == pytest.approx(0.001, rel=1e-3)


def test_a_rho_of_zero_changes_nothing(train):
    plain = train("--max_steps 4", job="plain")
    zero = train("--max_steps 4 --sam_rho 0", job="zero")
    assert_same_weights(plain, zero)
    assert losses(plain.parent) == losses(zero.parent)
    arguments = read_json(zero / "args.json")["arguments"] | {"job_name": "plain"}
    del arguments["sam_rho"]  # of a run before the flag existed
    assert pretrain.finished_model(argparse.Namespace(**arguments)) == plain
    with pytest.raises(InputError, match="sam_rho was None, now 0.5"):
        train("--max_steps 4 --sam_rho 0.5", job="zero")


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(train, monkeypatch):
    flags = f"--sam_rho 0.1 --save_steps 3 --max_steps {8 if LONG else 5}"
    undisturbed = train(flags, job="undisturbed")
    crash_after_saving(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(flags, job="killed")
    monkeypatch.undo()
    resumed = train(flags, job="killed")
    assert_same_weights(undisturbed, resumed)
    assert losses(undisturbed.parent) == losses(resumed.parent)


@pytest.mark.parametrize("flags", ["--fp16", "--zero_stage 1", "--zero_stage 2"])
def test_what_has_no_whole_gradient_is_refused(train, tmp_path, flags):
    with pytest.raises(InputError, match=f"--sam_rho: .* which {flags} has not"):
        train(f"--sam_rho 0.05 {flags}")
    assert not (tmp_path / "job").exists()
