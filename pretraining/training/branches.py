"""Cooldown branches of a run at a constant learning rate (`--lr_schedule wsd`).

A branch begins with the trunk's weights and optimizer at a step, and the learning rate falls linearly to 0. Its random streams
are those of a run with another seed, derived from (seed, "branch", step). Its samples begin with the first shard that the trunk
has not begun. The trunk goes on from its own training state, as if there had been no branch.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from pcfg.common.files import InputError, keyed_rng
from pretraining.model.checkpoints import COOLED, check_folder, read_facts
from pretraining.training import state
from pretraining.training.arguments import differences, job_folder, member_folders, seeds_of
from pretraining.training.learner import Member
from pretraining.training.state import Progress, RunFacts, State

FOREVER = 1e6  # hours: a branch that has begun is finished


def is_branch_due(options: argparse.Namespace, progress: Progress) -> bool:
    """Whether a branch begins at the present step of the trunk."""
    is_at_step = progress.step in options.branch_steps or progress.is_below_target
    return options.lr_schedule == "wsd" and is_at_step


def cooled_name(step: int) -> str:
    """The name of the model folder of a branch."""
    return f"step{step:07d}{COOLED}"


def branch_options(options: argparse.Namespace, lr: float) -> argparse.Namespace:
    """The options of a run that does what a branch does, from the trunk's learning rate on."""
    changes: dict[str, Any] = {"lr": lr, "lr_schedule": "branch", "curve": "cooldown", "warmup_proportion": 0.0}
    changes |= dict.fromkeys(("total_training_time", "early_exit_time_marker"), FOREVER)
    changes |= {"max_steps": options.cooldown_steps, "num_epochs": 1 << 62}
    changes["train_batch_size"] = options.cooldown_batch_size or options.train_batch_size
    changes |= {"save_steps": [], "finetune_time_markers": [], "num_epochs_between_checkpoints": -1}
    changes |= {"use_early_stopping": False, "target_gap": None}
    changes |= {"job_name": job_folder(options).name, "current_run_id": ""}  # the trunk's, whatever else differs
    return argparse.Namespace(**vars(options) | changes)


def branch_members(members: tuple[Member, ...], step: int) -> tuple[Member, ...]:
    """The members of a branch, with streams of their own."""

    def of_branch(member: Member) -> Member:
        stream = int(keyed_rng(member.seed, "branch", step).integers(1 << 63))
        adversarial = member.adversarial and member.adversarial.of_stream(stream)
        return dataclasses.replace(member, stream=stream, train=member.train.of_stream(stream), adversarial=adversarial)

    return tuple(map(of_branch, members))


def branch_progress(trunk: Progress) -> Progress:
    """The beginning of a branch."""
    epoch = trunk.epoch + (trunk.batch > 0)
    seen = {"samples": trunk.samples, "tokens": trunk.tokens, "hours": trunk.hours, "diverged": dict(trunk.diverged)}
    return Progress.model_validate({"epoch": epoch, **seen})


def branch_state(states: Path, facts: RunFacts) -> State | None:
    """The newest intact training state of a branch of the same run in the folder `states`; others are deleted."""
    try:
        newest = state.newest(states)
    except InputError as error:
        print(f"warning: {error}")
        newest = None
    if newest is not None and not differences(newest.saved.arguments, facts.arguments):
        return newest
    if states.exists():
        shutil.rmtree(states)
    return None


def cooled_models(options: argparse.Namespace, step: int) -> dict[str, str] | None:
    """Whether the models of a branch are there, intact and of a run with these options: None if not.

    Else the reasons, by name, of the members that diverged before its end and have none.
    """
    missing = set()
    diverged: dict[str, str] = {}
    for seed, folder in zip(seeds_of(options), member_folders(options), strict=True):
        path = folder / cooled_name(step)
        try:
            facts = read_facts(path)
            if facts and not differences(facts.get("arguments", {}), vars(options)):
                check_folder(path)
                diverged |= facts.get("diverged", {})
                continue
        except InputError as error:
            print(f"warning: {error}")
        missing.add(f"seed {seed}")
    return diverged if missing <= diverged.keys() else None


def check_earlier_branches(options: argparse.Namespace, step: int) -> None:
    """Refuse to go on at a step of the trunk from where branches that are to come before it can't be made any more."""
    for earlier in options.branch_steps if options.lr_schedule == "wsd" else ():
        if earlier < step and cooled_models(options, earlier) is None:
            raise InputError(
                f"{member_folders(options)[0] / cooled_name(earlier)}: missing, and the trunk is at step {step}, after it; "
                f"leave {earlier} out of --branch_steps, or begin anew (--overwrite, or another --job_name)"
            )
