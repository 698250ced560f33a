"""Builds a made-up folder of results: a study file, models with all records, controls. The numbers are arguments."""

import hashlib
import json

import numpy as np

from pcfg.common.files import write_json
from pretraining.evaluation.records import RECORDS, write_record
from pretraining.experiments.study import (
    Candidate,
    Choice,
    Comparison,
    Control,
    Criteria,
    Decision,
    Group,
    Measurement,
    Models,
    Registration,
    Status,
    Studies,
    Study,
    Task,
    decision_file,
    write_statuses,
    write_studies,
)
from pretraining.model.config import ModelConfig

SEEDS = tuple(range(100, 108))
SELECTION = (1000, 1001, 1002)
COUNTS = (100, 1000)
TASKS = (
    Task(name="pcfg_A", label="A", train_file="data/a.csv", validation_file="data/b.csv", generate={}),
    Task(name="pcfg_C", label="third word", train_file="data/c.csv", validation_file="data/d.csv", generate={}),
)
SHA256 = hashlib.sha256(b"study").hexdigest()


def record(folder, name, measurement, value, error, **fields):
    inputs = {"model": {"sha256": hashlib.sha256(str(folder).encode()).hexdigest()}, **fields.pop("inputs", {})}
    common = {"inputs": inputs, "arguments": {}, "seconds": 1.0, "device": "cpu", "n": 500, "unit": "nats"}
    write_record(folder, name, RECORDS[measurement](value=value, standard_error=error, **common, **fields))


def means(value, error):
    part = {"mean": value, "standard_error": error}
    return {"pairs": part, "sentences": part}


def write_curve(folder, task, accuracies, solver="ridge", features="hidden", majority=0.39):
    """A label curve; `accuracies` are fractions, one per entry of `COUNTS`."""
    points = [
        {
            "labels": labels,
            "draws": 20,
            "accuracy": {"mean": accuracy, "standard_error": 0.004},
            "missing_classes": 0,
            "sampling_standard_error": 0.005,
            "strengths": [0.1],
        }
        for labels, accuracy in zip(COUNTS, accuracies, strict=True)
    ]
    fields = {"task": task, "points": points, "majority": majority, "features": features, "pool": "concat", "solver": solver}
    record(folder, f"curve_{task}_{solver}.json", "curve", accuracies[-1], 0.004, **fields)


def write_flatness(folder, tables, head_norm, matrices, vectors, relative, difference=0.1):
    """A Fisher record with all its numbers; T, H, M, V have independent errors of 2%."""
    values = np.array([tables, head_norm, matrices, vectors])
    trace = float(values.sum())
    balanced = {"value": 2 * (tables * head_norm) ** 0.5 + matrices + vectors, "standard_error": 0.2}
    balanced |= dict(zip(("tables", "head_norm", "matrices", "vectors"), values.tolist(), strict=True))
    balanced["covariance"] = np.diag((0.02 * values) ** 2).tolist()
    part = {"value": trace - difference, "standard_error": 0.5, "difference": {"value": difference, "standard_error": 0.2}}
    record(
        folder,
        "hessian.json",
        "hessian",
        trace,
        0.02 * trace,
        estimator="fisher",
        balanced=balanced,
        relative={"value": relative, "standard_error": 10.0},
        constant_share={"value": 0.4, "standard_error": 0.01},
        hutchinson=part,
    )


def write_loss(folder, gap, error=0.0005):
    parts = {"loss": means(2.198 + gap, 0.01), "entropy": means(2.198, 0.01), "gap": means(gap, error)} if gap else {}
    record(folder, "loss.json", "loss", 2.198 + (gap or 0), 0.01, sampled_loss=means(2.198 + (gap or 0.0), 0.02), **parts)


def write_model(folder, hidden=32, step=8000, heads=2, job="job"):
    folder.mkdir(parents=True)
    config = ModelConfig(20, hidden, 2, heads, 2 * hidden, max_position_embeddings=6)
    write_json(folder / "config.json", config.to_transformers())
    (folder / "model.safetensors").write_bytes(str(folder).encode())
    write_json(folder / "args.json", {"step": step, "job_name": job})


def write_measured(folder, rng, gap, trace, accuracies, hidden=32, step=8000, difference=0.1, lbfgs=0.0):
    """A model whose numbers scatter a little around those given.

    Args:
        accuracies: by task of `TASKS` the accuracies by label count; shared deviations come from `rng`.
    """
    write_model(folder, hidden, step)
    write_loss(folder, None if gap is None else gap + rng.normal(0, 3e-4))
    tables = 0.8 * trace * np.exp(rng.normal(0, 0.02))
    write_flatness(
        folder, tables, 0.03 * trace, 0.12 * trace, 0.05 * trace, 70 * trace * np.exp(rng.normal(0, 0.02)), difference
    )
    for task, values in accuracies.items():
        scattered = [value + rng.normal(0, 0.003) for value in values]
        write_curve(folder, task, scattered)
        write_curve(folder, task, [value + lbfgs for value in scattered], solver="lbfgs")
    write_json(folder / "mine.json", {"number": float(trace / 10 + rng.normal(0, 0.1)), "se": 0.1})


def group(name, steps=(8000,), seeds=SEEDS, label=None, start=None, flags=None, folder=None):
    folders = {f"{seed}@{step}": f"{folder or 'models'}/{name}/seed{seed}/step{step:07d}" for seed in seeds for step in steps}
    return Group(name=name, label=label or name, flags=flags or {}, start=start, seeds=seeds, steps=steps, folders=folders)


def comparison(name, before, after, **fields):
    """A comparison of two groups at step 8000, or at the step behind an @."""
    sides = {}
    for side, text in (("before", before), ("after", after)):
        of_group, _, step = text.partition("@")
        sides[side] = Models(group=of_group, step=int(step or 8000))
    fields = {"tasks": ("pcfg_A", "pcfg_C"), "labels": COUNTS, "claim": f"Claim of {name}", **fields}
    return Comparison(name=name, **sides, **fields)


def studies_of(groups, comparisons, base, **fields):
    """A folder's studies: one of all comparisons, unless `studies` are given."""
    study = Study(name="mine", title="My study", question="Does it?", sha256=SHA256, comparisons=tuple(comparisons))
    defaults = {
        "scale": "mini",
        "studies": (study,),
        "text": {},
        "samples": {},
        "tasks": TASKS,
        "stacked": False,
        "readouts": ("ridge", "lbfgs"),
        "label_counts": COUNTS,
        "groups": {of.name: of for of in groups},
        "base": base,
        "selection": group(base.group, (base.step,), SELECTION, folder="selection"),
        "controls": (
            Control(name="words", folders=("controls/words",)),
            Control(name="untrained", folders=tuple(f"selection/base/seed{seed}/step0000000" for seed in SELECTION)),
            Control(name="lookup", folders=("controls/lookup",)),
        ),
        "choices": (),
        "measurements": (),
        "criteria": Criteria(),
        "registrations": (Registration(time="2026-11-28T00:00:00Z", sha256={"mine": SHA256}, accuracies=0),),
        "commands": {},
    }
    return Studies(**{**defaults, **fields})


def write_controls(root, words, untrained, lookup, base=None):
    """The controls' records, and those of the base group's models of the selection seeds; by task, fractions by label count."""
    for name, values in (("words", words), ("lookup", lookup)):
        folder = root / "controls" / name
        folder.mkdir(parents=True)
        write_json(folder / "args.json", {"model": "words" if name == "words" else "lookup table"})
        for task, accuracies in values.items():
            for solver in ("ridge", "lbfgs"):
                write_curve(folder, task, accuracies, solver, features="words" if name == "words" else "conditional")
    rng = np.random.default_rng(1)
    for seed in SELECTION:
        folder = root / f"selection/base/seed{seed}/step0000000"
        write_model(folder, step=0)
        for task, accuracies in untrained.items():
            write_curve(folder, task, [value + rng.normal(0, 0.001) for value in accuracies])
        folder = root / f"selection/base/seed{seed}/step0008000"
        write_model(folder)
        for task, accuracies in (base or {}).items():
            write_curve(folder, task, [value + rng.normal(0, 0.001) for value in accuracies])


BASE = {"pcfg_A": (0.742, 0.912), "pcfg_C": (0.913, 0.983)}
WORDS = {"pcfg_A": (0.649, 0.802), "pcfg_C": (0.827, 0.949)}
UNTRAINED = {"pcfg_A": (0.626, 0.804), "pcfg_C": (0.816, 0.947)}
LOOKUP = {"pcfg_A": (0.802, 0.861), "pcfg_C": (0.853, 0.869)}


def shifted(values, points):
    return {task: tuple(value + points for value in of_task) for task, of_task in values.items()}


def write_laboratory(root):
    """A study with something of everything: verdicts of each kind, widths, a start, a choice, a failed command."""
    rng = np.random.default_rng(7)
    base = Models(group="base", step=8000)
    groups = [
        group("base", (8000, 16000), label="AdamW"),
        group("sgd", (12000,), label="SGD 0.4", start=base),
        group("adversarial", label="adversarial", flags={"adversarial_weight": "{weight}"}),
        group("wide", (16000,), SEEDS[:4], label="width 64"),
        group("unsaturated"),
        group("other_seeds", seeds=tuple(range(200, 206))),
    ]
    numbers = {
        ("base", 8000): (0.0147, 30.3, BASE),
        ("base", 16000): (0.0118, 18.7, shifted(BASE, 0.001)),
        ("sgd", 12000): (0.0120, 9.1, shifted(BASE, 0.012)),
        ("adversarial", 8000): (0.0143, 30.2, shifted(BASE, -0.07)),
        ("wide", 16000): (0.0104, 14.0, shifted(BASE, 0.01)),
        ("unsaturated", 8000): (0.03, 60.0, shifted(BASE, -0.02)),
        ("other_seeds", 8000): (0.0150, 31.0, shifted(BASE, 0.002)),
    }
    for of in groups:
        for (name, step), (gap, trace, accuracies) in numbers.items():
            if name == of.name:
                for seed in of.seeds:
                    hidden = 64 if name == "wide" else 32
                    difference = 5.0 if name == "unsaturated" else 0.1
                    folder = root / of.folders[f"{seed}@{step}"]
                    write_measured(folder, rng, gap, trace, accuracies, hidden, step, difference, lbfgs=-0.01)
    write_controls(root, WORDS, UNTRAINED, LOOKUP, BASE)
    comparisons = [
        comparison("sgd", "base", "sgd@12000", flatness="falls", accuracy="rises", primary=True),
        comparison("adamw", "base@8000", "base@16000", flatness="falls", accuracy="rises", primary=True),
        comparison("adversarial", "base", "adversarial", flatness="rises", accuracy="falls", primary=True),
        comparison("sizes", "base@16000", "wide@16000", trace="balanced", flatness="falls", accuracy="rises"),
        comparison("unsaturated", "base", "unsaturated"),
        comparison("seeds", "base", "other_seeds"),
    ]
    choice = Choice(
        name="weight",
        group="adversarial",
        flag="adversarial_weight",
        values=(0.1, 1.0),
        rule="lowest_accuracy",
        task="pcfg_A",
        labels=100,
    )
    broken = "models/base/seed107/step0016000/curve_pcfg_C_lbfgs.json"
    (root / broken).unlink()
    studies = studies_of(
        groups,
        comparisons,
        base,
        choices=(choice,),
        measurements=(Measurement(name="mine", command="python mine.py {model} {record}", value="number", error="se"),),
        commands={broken: "python run_lp.py --solver lbfgs", "models/base/seed107/step0016000": "python run_pretraining.py"},
    )
    write_studies(root, studies)
    candidates = (
        Candidate(value=0.1, gap=0.0144, gap_error=0.0002, accuracy=0.56, accuracy_error=0.01, admitted=True),
        Candidate(value=1.0, gap=0.0264, gap_error=0.0002, accuracy=0.4, accuracy_error=0.01, admitted=False),
    )
    decision = Decision(choice=choice, seeds=SELECTION, limit=0.0197, candidates=candidates, chosen=0.1)
    write_json(root / decision_file("weight"), json.loads(decision.model_dump_json()))
    write_statuses(root, {"probe C": Status(state="failed", exit_code=3, log="logs/probe_C.txt"), "base": Status(state="done")})
    return studies
