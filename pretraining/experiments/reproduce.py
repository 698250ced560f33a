"""The experiments of Liu et al. 2023, from nothing to the report, for scripts/reproduce_steps.sh, _sizes, _algorithms and _all.

    bash scripts/reproduce_all.sh --scale mini --out OUT
    bash scripts/reproduce_steps.sh --scale mini --out OUT --dry-run    (prints the commands, and which are done)

steps: training on after the loss has converged, by AdamW and by SGD. sizes: models of growing size, traces in the parameters
of the largest. algorithms: standard and adversarial pre-training, and the lookup table. All train with one mask per sentence,
so that the minimum of the loss is exactly the entropy. It is safe to interrupt: rerun the same command to resume. Files that
several experiments need in one OUT are made once. A command that fails does not stop the others, and the report marks its
results as missing, with the reason. Exit code 1 if one failed.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import datetime
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from pcfg.common.cli import Parser, ascending, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError
from pretraining.experiments.plan import SCALES, Planner, Step
from pretraining.experiments.runner import ROOT, Runner, is_done, lock
from pretraining.report.contract import NAMES, Experiments, Status, read_experiments, read_statuses, write_experiments

# Of the commands: nothing from a network.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}


def seed_list(text: str) -> list[int]:
    """An argparse type: different seeds, comma-separated.

    >>> seed_list("2,0")
    [0, 2]
    """
    seeds = ascending(non_negative_int)(text)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} has no seed")
    return seeds


def task_list(text: str) -> list[str]:
    """An argparse type: tasks among A, B and C, comma-separated.

    >>> task_list("B,A")
    ['A', 'B']
    """
    tasks = sorted({part.strip() for part in text.split(",") if part.strip()})
    if not tasks or not set(tasks) <= {"A", "B", "C"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of A, B and C")
    return tasks


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="reproduce", description=__doc__)
    parser.add_argument("experiment", choices=(*NAMES, "all"), help="given by the name of the script")
    group = parser.add_argument_group("what")
    group.add_argument(
        "--scale",
        choices=SCALES,
        default="mini",
        help="mini: 2 CPU cores; small: one GPU; paper: nodes of GPUs (default: mini)",
    )
    group.add_argument("--seeds", type=seed_list, default=[0, 1, 2], help="of pre-training, comma-separated (default: 0,1,2)")
    group.add_argument("--task", type=task_list, default=["A", "B", "C"], help="downstream tasks (default: A,B,C)")
    group.add_argument("--out", help="folder of everything (default: reproduction_SCALE)")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--jobs", type=positive_int, help="commands at a time (default: without a GPU one per core, each of one thread; else 1)"
    )
    group.add_argument(
        "--launcher",
        type=shlex.split,
        help="words that start run_pretraining.py: 'deepspeed --hostfile hosts', 'bash scripts/srun_torchrun.sh' (default: "
        "deepspeed with several GPUs, else python)",
    )
    group.add_argument("--dry-run", action="store_true", help="print every command and whether it is done; run nothing")
    return parser


def check_same(existing: Experiments, planned: Experiments, out: Path) -> None:
    """Refuse a folder whose experiments have another scale, seeds or tasks."""
    for name in ("scale", "seeds", "tasks"):
        old = getattr(existing, name)
        new = getattr(planned, name)
        if old != new:
            old, new = (value if isinstance(value, str) else ",".join(map(str, value)) for value in (old, new))
            flag = "--task" if name == "tasks" else f"--{name}"
            raise InputError(f"{flag} {new}: {out} has experiments with {flag} {old}; give another --out, or {flag} {old}")


def describe(steps: list[Step], statuses: dict[str, Status], environment: dict[str, str], out: Path) -> str:
    """The plan as a text that a shell could run: each command after a comment with its name and state."""
    lines = [
        f"# environment: {' '.join(f'{name}={value}' for name, value in environment.items())}",
        f"OUT={shlex.quote(str(out))}",
    ]
    seconds = []
    done = 0
    for step in steps:
        state = ""
        if is_done(step, out):
            done += 1
            state = ": done"
            if (status := statuses.get(step.name)) and status.seconds is not None:
                seconds.append(status.seconds)
                state += f" in {duration(status.seconds)}"
        lines.append(f"# {step.name}{state}\n{step.command}")
    measured = f", {len(seconds)} of them took {duration(sum(seconds))} one after another" if seconds else ""
    lines.append(f"# {len(steps)} commands, {done} done{measured}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    scale = SCALES[options.scale]
    gpus = torch.cuda.device_count()
    names = list(NAMES) if options.experiment == "all" else [options.experiment]
    out = Path(options.out or f"reproduction_{scale.name}").resolve()
    jobs = options.jobs or (1 if gpus else os.cpu_count() or 1)
    launcher = options.launcher or (["deepspeed"] if gpus > 1 else ["python"])
    existing = read_experiments(out)
    steps, planned = Planner(scale, names, options.seeds, options.task, launcher).plan()
    if existing is not None:
        check_same(existing, planned, out)
        # The results of other experiments in this folder stay in the report.
        all_names = [name for name in NAMES if name in names or name in {part.name for part in existing.experiments}]
        planned = Planner(scale, all_names, options.seeds, options.task, launcher).plan()[1]
    environment = dict(ENVIRONMENT)
    if not gpus:  # one number of threads, which also fixes the arithmetic
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    if options.dry_run:
        print(describe(steps, read_statuses(out), environment, out))
        return
    with lock(out) as descriptor:
        write_experiments(out, planned)
        all_done = Runner(steps, out, jobs, environment, descriptor).run()
    report = [sys.executable, "-m", "pretraining.report", str(out), "--output", str(out / "report")]
    done = subprocess.run(report, cwd=ROOT, env={**os.environ, **environment}, check=False)
    sys.exit(done.returncode or (0 if all_done else 1))


if __name__ == "__main__":
    run_main(main)
