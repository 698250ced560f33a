"""The analysis of a made-up laboratory, in files; its numbers computed again from the CSV files by code of their own."""

import csv
import hashlib
import html
import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from pcfg.artefacts import InputError, keyed_rng, write_json
from pretraining.evaluation import analysis, experiments, report
from pretraining.evaluation.experiments import Choice, Command, Entry, Experiment, Experiments, Status, Weight
from pretraining.evaluation.records import write_record
from pretraining.model.config import ModelConfig

TASKS, SEEDS, STEPS = ("A", "B", "C"), (0, 1, 2), (500, 1000, 1500, 2000)
REFERENCE = "models/medium/seed0/step0002000"
WIDTHS = {"small": 8, "medium": 16, "large": 32}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def weights(folder: str) -> bytes:
    return folder.encode()  # the report reads none, but for the reference's hash


def record(root, folder, name, measurement, value, error, unit="nats", **details):
    inputs = {"data": {"sha256": digest("data")}, "model": {"sha256": hashlib.sha256(weights(folder)).hexdigest()}}
    inputs |= details.pop("inputs", {})
    common = {"inputs": inputs, "arguments": {}, "seconds": 1.0, "device": "cpu", "n": 500, "unit": unit}
    write_record(root / folder, name, measurement=measurement, value=value, standard_error=error, **common, **details)


def means(value, error):
    return {"pairs": {"mean": value + 1, "standard_error": error}, "sentences": {"mean": value, "standard_error": error}}


def write_model(root, folder, hidden, step, **facts):
    (root / folder).mkdir(parents=True)
    config = ModelConfig(50, hidden, 2, 2, 2 * hidden, max_position_embeddings=10)
    write_json(root / folder / "config.json", config.to_transformers())
    (root / folder / "model.safetensors").write_bytes(weights(folder))
    write_json(root / folder / "args.json", {"step": step, "job_name": folder.split("/")[1], **facts})


def accuracies(root, folder, rng, **values):
    for name, value in values.items():
        runs = (value + rng.normal(0, 0.003, 2)).tolist()
        kind = name.split("_")[0]
        details = {"accuracies": runs, "best_accuracy": max(runs), "sampling_standard_error": 0.01, "majority": 0.3}
        error = float(np.std(runs, ddof=1) / 2**0.5)
        record(root, folder, f"{name}.json", kind, float(np.mean(runs)), error, "accuracy", **details)


def measured(root, folder, rng, gap, trace, accuracy, finetune=True):
    """Everything that is measured of a model whose gap to the entropy is `gap`."""
    parts = {"loss": means(3 + gap, 0.01), "entropy": means(3.0, 0.01), "gap": means(gap, 0.0005)}
    record(root, folder, "loss.json", "loss", 3 + gap, 0.01, sampled_loss=means(3 + gap, 0.02), **parts)
    record(root, folder, "hessian.json", "hessian", trace, 0.02 * trace)
    if folder != REFERENCE:
        other = hashlib.sha256(weights(REFERENCE)).hexdigest()
        details = {"difference": means(gap - 0.01, 0.0004), "gap_a": means(gap, 0.0005), "gap_b": means(0.01, 0.0005)}
        details |= {"models": ["a", "b"], "inputs": {"other": {"sha256": other}}}
        record(root, folder, f"comparison_{other[:12]}.json", "comparison", gap - 0.01, 0.0004, **details)
    values = {f"probe_pcfg_{task}": accuracy - 0.05 * index for index, task in enumerate(TASKS)}
    accuracies(root, folder, rng, **values, **({"finetune_pcfg_B": accuracy + 0.05} if finetune else {}))


def write_laboratory(root) -> Experiments:
    """A laboratory in which the three findings hold for most accuracies; SGD never converges; one run failed."""
    rng, steps, sizes = np.random.default_rng(3), [], []
    for seed in SEEDS:
        for index, step in enumerate(STEPS):
            for group, folder, gap in (
                ("AdamW", f"models/medium/seed{seed}/step{step:07d}", 0.05 * 0.2**index + 0.01),
                ("SGD", f"models/sgd/seed{seed}/step{step:07d}", 0.3 - 0.02 * index),
            ):
                steps.append(Entry(group=group, seed=seed, step=step, folder=folder))
                write_model(root, folder, 16, step)
                gap = 0.01 if folder == REFERENCE else gap + rng.uniform(0, 1e-4)
                measured(root, folder, rng, gap, 100 - 10 * index + rng.normal(), 0.7 + 0.02 * index + rng.normal(0, 0.003))
        for group, hidden in WIDTHS.items():
            folder = f"models/{group}/seed{seed}/step0002000"
            common = {rule: f"enlarged/{rule}/{group}/seed{seed}" for rule in ("tables", "head")} if group != "large" else {}
            if (group, seed) == ("large", 1):
                folder = "models/large/seed1/step0002000"
            elif group != "medium":
                write_model(root, folder, hidden, 2000)
                measured(root, folder, rng, 0.012, 60 + rng.normal(), 0.7 + hidden / 200 + rng.normal(0, 0.003), finetune=False)
            for rule, enlarged in common.items():
                source = {"weights_sha256": digest(folder), "parameters": parameters(hidden)}
                facts = {"rule": rule, "times": 2, "heads": 2, "added_layers": [], "from": source}
                write_model(root, enlarged, 32, 2000, enlarged=facts)
                trace = 60 + (32 - hidden) * (2 if rule == "tables" else -1) + rng.normal()
                record(root, enlarged, "hessian.json", "hessian", trace, 1.0)
            sizes.append(Entry(group=group, seed=seed, step=2000, folder=folder, common=common))
    algorithms = [Entry(group="standard", seed=s, step=2000, folder=f"models/medium/seed{s}/step0002000") for s in SEEDS]
    for seed in SEEDS:
        folder = f"models/adversarial/seed{seed}/step0002000"
        algorithms.append(Entry(group="adversarial", seed=seed, step=2000, folder=folder))
        write_model(root, folder, 16, 2000)
        measured(root, folder, rng, 0.015, 140 + rng.normal(), 0.65 + rng.normal(0, 0.003))
    algorithms.append(Entry(group="lookup table", seed=None, step=None, folder="models/lookup_table"))
    (root / "models" / "lookup_table").mkdir()
    write_json(root / "models" / "lookup_table" / "args.json", {"model": "lookup table"})
    accuracies(root, "models/lookup_table", rng, **{f"probe_pcfg_{task}": 0.5 for task in TASKS})
    shutil.rmtree(root / "models/large/seed1", ignore_errors=True)
    (root / "models/adversarial/seed2/step0002000/probe_pcfg_C.json").unlink()
    tried = tuple(
        Weight(weight=w, gap_increase=g, gap_increase_se=0.001, accuracy=a, accuracy_se=0.004, standard_accuracy=0.76)
        for w, g, a in ((0.01, 0.001, 0.755), (0.1, 0.005, 0.65), (1.0, 0.06, 0.5))
    )
    write_choice(root, tried)
    plan = Experiments(
        scale="made up",
        seeds=SEEDS,
        tasks=TASKS,
        finetune_tasks=("B",),
        saturated=0.02,
        margin=0.02,
        reference=REFERENCE,
        experiments=(
            Experiment(name="steps", entries=tuple(steps)),
            Experiment(name="sizes", entries=tuple(sizes)),
            Experiment(name="algorithms", entries=tuple(algorithms), choice="adversarial/choice.json"),
        ),
        commands=(
            Command(name="train large seed1", command="python run_pretraining.py --seed 1", makes=("models/large/seed1",)),
            Command(
                name="probe C",
                command="python run_lp.py --train_file data/pcfg_C.csv",
                makes=("models/adversarial/seed2/step0002000/probe_pcfg_C.json",),
            ),
        ),
    )
    experiments.write_experiments(root, plan)
    failed = Status(state="failed", exit_code=1, seconds=3.5, log="logs/train_large_seed1.log")
    blocked = Status(state="blocked", why="needs the labelled sentences of C")
    experiments.write_statuses(root, {"train large seed1": failed, "probe C": blocked})
    return plan


def write_choice(root, tried):
    choice = Choice(criterion="the lowest accuracy within the gap allowed", gap_allowed=0.02, weights=tried, chosen=0.1)
    experiments.write_choice(root / "adversarial" / "choice.json", choice)


def parameters(hidden):
    """As tests/evaluation/test_report.py counts them."""
    layer = 4 * (hidden * hidden + hidden) + 2 * (2 * hidden * hidden) + 3 * hidden + 4 * hidden
    return 62 * hidden + 2 * layer + 2 * 3 * hidden + hidden * hidden + hidden + 50
