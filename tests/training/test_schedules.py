import argparse

import pytest
import torch
import transformers

from pretraining.training import trainer
from pretraining.training.branches import branch_options
from pretraining.training.engine import Schedule


def options(**changes):
    values = {"lr": 0.5, "lr_schedule": "step", "curve": "linear", "max_steps": 50, "total_training_time": 24.0}
    values |= {"warmup_proportion": 0.2, "num_warmup_steps": 5, "decay_rate": 0.9, "decay_step": 4}
    values |= {"output_dir": "out", "job_name": "job", "current_run_id": ""}
    return argparse.Namespace(**(values | changes))


def reference(factory, steps, **arguments):
    """Learning rates of a transformers schedule at the steps 0, 1, ..."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = factory(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_steps_are_those_of_transformers():
    schedule = Schedule.from_options(options())
    expected = reference(transformers.get_linear_schedule_with_warmup, 55, num_warmup_steps=10, num_training_steps=50)
    assert [schedule(step) for step in range(55)] == pytest.approx(expected)


def test_constant_step_has_its_own_warmup():
    schedule = Schedule.from_options(options(lr_schedule="constant_step", curve="const"))
    expected = reference(transformers.get_constant_schedule_with_warmup, 20, num_warmup_steps=5)
    assert [schedule(step) for step in range(20)] == pytest.approx(expected)


def test_wsd_is_constant_after_its_warmup_and_a_branch_ends_at_zero():
    trunk = Schedule.from_options(options(lr_schedule="wsd"))
    assert [trunk(step) for step in range(60)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, *[0.5] * 55])
    changes = {"cooldown_steps": 4, "cooldown_batch_size": None, "train_batch_size": 8}
    branch = Schedule.from_options(branch_options(options(lr_schedule="wsd", **changes), trunk(50)))
    assert [branch(step) for step in range(4)] == pytest.approx([0.375, 0.25, 0.125, 0.0])


def test_exponential_curve():
    schedule = Schedule.from_options(options(curve="exp"))
    assert [schedule(step) for step in (0, 5, 10, 14, 30)] == pytest.approx([0.0, 0.5 * 0.25, 0.5, 0.5 * 0.9, 0.5 * 0.9**5])


def test_time_is_in_hours_also_below_one():
    # The released code divides by max(1, hours left), which is wrong for short runs.
    schedule = Schedule.from_options(options(lr_schedule="time", total_training_time=0.1))
    assert [schedule(hours) for hours in (0, 0.01, 0.02, 0.06, 0.1, 0.2)] == pytest.approx([0.0, 0.25, 0.5, 0.25, 0.0, 0.0])


def test_a_warmup_that_never_ends_never_exceeds_the_peak():
    schedule = Schedule.from_options(options(warmup_proportion=1.0))
    assert max(schedule(step) for step in range(60)) <= 0.5
    assert schedule(50) == 0.0


def test_the_clock_goes_on_where_it_was(monkeypatch):
    seconds = iter([1000.0, 1000.0 + 1800.0])
    monkeypatch.setattr(trainer, "monotonic", lambda: next(seconds))
    assert trainer.clock(hours=3.0)() == pytest.approx(3.5)
