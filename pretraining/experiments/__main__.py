"""Run studies: train, choose, measure, report.

    python -m pretraining.experiments my_study.toml --out OUT --dry-run      (prints what it would do, and what exists)
    python -m pretraining.experiments scripts/studies/steps.toml scripts/studies/sizes.toml --out OUT --scale mini

A study is a TOML file (pretraining/README.md, "Studies"): its question, language, groups of models and comparisons. Studies of
one OUT share what they have in common. It is safe to interrupt: rerun the same command to resume. A command that fails does
not stop the others, and the report marks its results as missing, with the reason. Exit code 1 if one failed.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import dataclasses
import datetime
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pcfg.common.cli import Parser, positive_int, run_main
from pcfg.common.files import InputError, available_cores
from pretraining.experiments.plan import STAGES, Planner, Step, fingerprint
from pretraining.experiments.resolve import ROOT, Design, merge, resolve
from pretraining.experiments.runner import Runner, is_done, lock
from pretraining.experiments.study import Registration, Studies, read_decision, read_statuses, read_studies, write_studies

# Of the commands: nothing from a network.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
ACCURACIES = ("curve_*.json", "probe_*.json", "finetune_*.json")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.experiments", description=__doc__)
    parser.add_argument("studies", metavar="STUDY", type=Path, nargs="+", help="study file, TOML")
    group = parser.add_argument_group("what")
    group.add_argument("--out", type=Path, required=True, help="folder of everything; made if missing")
    group.add_argument("--scale", help="settings of [scales.NAME] in the study files (default: without)")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--jobs", type=positive_int, help="commands at a time (default: without a GPU one per core, each of one thread; else 1)"
    )
    group.add_argument(
        "--launcher",
        type=shlex.split,
        help="words that start run_pretraining.py of one seed: 'deepspeed --hostfile hosts', 'bash scripts/slurm_ranks.sh' "
        "(default: deepspeed with several GPUs, else python)",
    )
    group.add_argument("--dry-run", action="store_true", help="print stages, runs, folders and what exists; run nothing")
    return parser


def read_designs(paths: list[Path], scale: str | None) -> Design:
    """The design of all study files, each study with the hash of its own resolved form."""
    designs = []
    for path in paths:
        design = resolve(path, scale)
        content = fingerprint(Planner(design, ["python"]).plan()[1])
        [study] = design.studies
        study = study.model_copy(update={"sha256": hashlib.sha256(content.encode()).hexdigest()})
        designs.append(dataclasses.replace(design, studies=(study,)))
    return merge(designs, paths)


def changed_flags(old: str, new: str) -> str:
    """The flags that differ between two command lines, in words.

    >>> changed_flags("x.py --lr 1 --fp16", "x.py --lr 2 --fp16")
    '--lr was 1, now 2'
    """
    before, now = (dict(part.partition(" ")[::2] for part in re.split(r" (?=--)", command)) for command in (old, new))
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {before.get(name, 'not given')}, now {now.get(name, 'not given')}" for name in names)


def with_others(planned: Studies, existing: Studies | None, out: Path) -> Studies:
    """`study.json` of the planned studies and of those that the folder has already."""
    if existing is None:
        return planned
    names = {study.name for study in planned.studies}
    others = [study for study in existing.studies if study.name not in names]
    shared = ("scale", "text", "samples", "base", "stacked", "readouts", "label_counts", "criteria")
    for name in shared if others else ():
        if getattr(existing, name) != getattr(planned, name):
            old = f"{getattr(existing, name)!r}, now {getattr(planned, name)!r}"
            raise InputError(f"{out}: {name} of its study {others[0].name} is {old}; give another --out")
    for path in existing.commands.keys() & planned.commands.keys():
        old, new = (
            commands.split(" run_pretraining.py ")[-1] for commands in (existing.commands[path], planned.commands[path])
        )
        if old != new and (out / path).exists():
            raise InputError(f"{out / path}: was made with other flags ({changed_flags(old, new)}); give another --out")
    for choice in planned.choices:
        decision = read_decision(out, choice.name)
        if decision and decision.choice != choice:
            raise InputError(f"{out}: choice {choice.name} was decided with other settings; give another --out")

    def union(name: str) -> tuple:
        new = getattr(planned, name)
        own = {part.name for part in new}
        return (*new, *(part for part in getattr(existing, name) if part.name not in own))

    names_of_lists = ("tasks", "choices", "measurements", "controls")
    update: dict[str, Any] = {name: union(name) for name in names_of_lists} if others else {}
    update |= {"groups": existing.groups | planned.groups, "commands": existing.commands | planned.commands} if others else {}
    update |= {"studies": (*planned.studies, *others), "registrations": existing.registrations}
    return planned.model_copy(update=update)


def register(studies: Studies, out: Path) -> Studies:
    """With a registration of the studies that the folder has not seen, and the number of accuracies it has already."""
    known = {(name, digest) for registration in studies.registrations for name, digest in registration.sha256.items()}
    new = {study.name: study.sha256 for study in studies.studies if (study.name, study.sha256) not in known}
    if not new:
        return studies
    models = [out / folder for group in studies.groups.values() for folder in group.folders.values()]
    accuracies = sum(len(list(folder.glob(pattern))) for folder in models for pattern in ACCURACIES)
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    registration = Registration(time=time, sha256=new, accuracies=accuracies)
    return studies.model_copy(update={"registrations": (*studies.registrations, registration)})


def describe(steps: list[Step], studies: Studies, out: Path) -> str:
    """What the studies do: questions, groups with their folders, and by stage the commands and how many are done."""
    lines = []
    for study in studies.studies:
        lines.append(f"{study.title}: {study.question}  (study {study.name}, hash {study.sha256[:12]})")
        for pair in study.comparisons:
            models = [f"{models.group} at step {models.step}" for models in (pair.before, pair.after)]
            lines.append(f"    {'primary' if pair.primary else 'further'}: {models[0]} against {models[1]}")
    lines.append(f"\ngroups ({'the seeds of each in one process' if studies.stacked else 'one process per seed'}):")
    for group in studies.groups.values():
        start = f", from {group.start.group} at step {group.start.step}" if group.start else ""
        exist = sum((out / folder).is_dir() for folder in group.folders.values())
        lines.append(
            f"    {group.name}: seeds {', '.join(map(str, group.seeds))}, steps {', '.join(map(str, group.steps))}{start}; "
            f"{exist} of {len(group.folders)} models in {out}/models/{group.name}"
        )
    lines.append("\nstage          commands  done  models and records")
    statuses = read_statuses(out)
    for stage in STAGES:
        own = [step for step in steps if step.stage == stage]
        done = [step for step in own if is_done(step, out)]
        paths = [path for step in own for path in step.all_makes]
        exist = sum((out / path).exists() for path in paths)
        seconds = sum(statuses[step.name].seconds or 0 for step in done if step.name in statuses)
        took = f", {datetime.timedelta(seconds=round(seconds))} one after another" if seconds else ""
        lines.append(f"{stage:14} {len(own):8}  {len(done):4}  {exist} of {len(paths)}{took}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    gpus = torch.cuda.device_count()
    out = options.out.resolve()
    cores = available_cores()
    jobs = options.jobs or (1 if gpus else cores)
    launcher = options.launcher or (["deepspeed"] if gpus > 1 else ["python"])
    design = read_designs(options.studies, options.scale)
    steps, planned = Planner(design, launcher).plan()
    if options.dry_run:
        print(describe(steps, with_others(planned, read_studies(out), out), out))
        return
    environment = dict(ENVIRONMENT)
    if not gpus:  # one number of threads, which also fixes the arithmetic
        environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    with lock(out) as descriptor:
        write_studies(out, register(with_others(planned, read_studies(out), out), out))
        all_done = Runner(steps, out, jobs, environment, descriptor).run()
    report = [sys.executable, "-m", "pretraining.report", str(out), "--output", str(out / "report")]
    done = subprocess.run(report, cwd=ROOT, env={**os.environ, **environment}, check=False)
    sys.exit(done.returncode or (0 if all_done else 1))


if __name__ == "__main__":
    run_main(main)
