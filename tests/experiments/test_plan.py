"""The plans of all scales: what they hang on, and that every script knows its flags."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pcfg import lookup
from pretraining.evaluation.downstream import parse_arguments
from pretraining.experiments import choose, reproduce
from pretraining.experiments.plan import SCALES, Planner, Step
from pretraining.report.contract import ALGORITHMS, NAMES, SIZES, STEPS, Status, read_experiments, write_experiments
from pretraining.training.arguments import parse_with_config

ROOT = Path(__file__).parents[2]


def plan(scale=SCALES["mini"], names=NAMES, seeds=(0, 1), tasks=("A", "B"), launcher=("python",)):
    return Planner(scale, list(names), list(seeds), list(tasks), list(launcher)).plan()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("names", [NAMES, (STEPS,), (SIZES,), (ALGORITHMS,)], ids=["all", *NAMES])
def test_nothing_hangs_on_what_comes_later_and_every_entry_is_made(scale, names, tmp_path):
    steps, experiments = plan(scale, names)
    seen, makes = set(), set()
    for step in steps:
        assert step.name not in seen
        assert {*step.needs, *step.after} <= seen, step.name
        # What a command names below OUT, but for data, was made before, is made by itself, or is what it waits for.
        for path in re.findall(r"\$OUT/(\S+)", step.command):
            known = [path == made or made.startswith(f"{path}/") for made in (*makes, *step.makes, step.requires or "")]
            assert path.split("/")[0] == "data" or any(known), (step.name, path)
        seen.add(step.name)
        makes |= set(step.makes)
    records = {folder for step in steps for folder, _ in step.records}
    for experiment in experiments.experiments:
        for entry in experiment.entries:
            assert entry.folder in makes | {"models/lookup_table"}
            assert entry.folder in records | {"models/lookup_table"}
            assert set(entry.common.values()) <= makes & records
    assert [experiment.name for experiment in experiments.experiments] == list(names)
    assert experiments.reference in makes
    write_experiments(tmp_path, experiments)
    assert read_experiments(tmp_path) == experiments


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scales_are_consistent(scale):
    assert scale.steps in scale.checkpoints and list(scale.checkpoints) == sorted(scale.checkpoints)
    large = scale.sizes[scale.largest]
    for size in scale.sizes.values():  # what enlarge.py can do
        assert large.hidden_size % size.hidden_size == 0 and large.layers >= size.layers
        assert size.hidden_size % size.heads == 0 and size.hidden_size // size.heads == large.hidden_size // large.heads
    assert list(scale.sizes) == sorted(scale.sizes, key=lambda name: scale.sizes[name].hidden_size)
    assert scale.batch <= scale.sentences and scale.adversarial_batch <= scale.labelled


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_script_knows_its_flags(scale, tmp_path):
    (tmp_path / "adversarial").mkdir()
    (tmp_path / "adversarial/chosen.json").write_text('{"arguments": {"adversarial_weight": 0.5}}')
    parsers = {}
    for step in plan(scale)[0]:
        words = [word.replace("$OUT", str(tmp_path)) for word in step.words]
        assert words[0] == "python"
        script, arguments = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
        if script in ("run_lp", "run_ft"):
            module = importlib.import_module(script)
            parse_arguments(module.build_parser(), [*arguments, "--use_cpu"])
        elif script == "run_pretraining":
            options = parse_with_config(importlib.import_module(script).build_parser(), arguments)
            assert options.adversarial_weight == (0.5 if "--config" in arguments else options.adversarial_weight)
            assert bool(options.adversarial_file) == (
                "adversarial" in step.name or re.search(r"selection_\d", step.name) is not None
            )
        else:
            parsers.setdefault(script, importlib.import_module(script).build_parser()).parse_args(arguments)
    assert {"generate_pretraining", "generate_samples", "generate_downstream", "calculate_loss", "enlarge"} <= parsers.keys()
    assert parsers.keys() >= {lookup.__name__, choose.__name__}


def test_seeds_and_tasks_are_all_there():
    steps, experiments = plan(seeds=(3, 5), tasks=("C",))
    names = {step.name for step in steps}
    assert {"train medium seed 3", "train medium_sgd seed 5", "probe C of large"} <= names
    assert not any("probe A" in name or "seed 0" in name for name in names)
    assert experiments.seeds == (3, 5) and experiments.tasks == ("C",) and experiments.finetune_tasks == ()
    [adversarial] = [step for step in steps if step.name == "train adversarial seed 5"]
    assert adversarial.requires == "adversarial/chosen.json" and "choice of the weight" in adversarial.needs


def test_the_launcher_starts_pre_training_and_nothing_else():
    steps, _ = plan(launcher=("deepspeed", "--hostfile", "my hosts"))
    for step in steps:
        assert step.command.startswith("deepspeed --hostfile 'my hosts' run_pretraining.py") == step.name.startswith("train ")


def test_what_experiments_share_is_made_by_the_same_commands():
    commands = [{step.name: step.command for step in plan(names=(name,))[0]} for name in NAMES]
    together = {step.name: step.command for step in plan()[0]}
    for some in commands:
        assert some.items() <= together.items()


def test_dry_run_prints_commands_and_does_nothing(tmp_path):
    command = ["bash", "scripts/reproduce_sizes.sh", "--dry-run", "--seeds", "1", "--task", "B", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    steps, _ = plan(names=(SIZES,), seeds=(1,), tasks=("B",))
    for step in steps:
        assert f"# {step.name}\n{step.command}\n" in done.stdout
    assert done.stdout.endswith(f"# {len(steps)} commands, 0 done\n")


def test_dry_run_counts_what_is_done_and_the_measured_time(tmp_path):
    steps = [Step(name=name, words=("true",), makes=(name,)) for name in ("a", "b", "c")]
    for name in ("a", "b"):
        (tmp_path / name).touch()
    statuses = {"a": Status(state="done", seconds=61.0), "b": Status(state="done")}
    text = reproduce.describe(steps, statuses, {"OMP_NUM_THREADS": "1"}, tmp_path)
    assert "# a: done in 0:01:01\ntrue\n# b: done\ntrue\n# c\ntrue\n" in text
    assert text.endswith("# 3 commands, 2 done, 1 of them took 0:01:01 one after another")


def test_another_scale_or_seeds_in_the_same_folder_are_an_error(tmp_path):
    write_experiments(tmp_path, plan()[1])
    script = [sys.executable, "-m", "pretraining.experiments.reproduce", "steps", "--out", str(tmp_path), "--task", "A,B"]
    for flags, text in (
        (["--seeds", "0"], "--seeds 0: .*with --seeds 0,1"),
        (["--scale", "small"], "--scale small: .*--scale mini"),
    ):
        done = subprocess.run([*script, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and re.search(text, done.stderr) and "Traceback" not in done.stderr


def test_seed_and_task_lists():
    options = reproduce.build_parser().parse_args(["all", "--task", "B"])
    assert (options.seeds, options.task, options.scale) == ([0, 1, 2], ["B"], "mini")
    for flags in (["--task", "D"], ["--seeds", "x"], ["--seeds", ","], ["--scale", "huge"], ["--task", ""]):
        with pytest.raises(SystemExit) as error:
            reproduce.build_parser().parse_args(["all", *flags])
        assert error.value.code == 2
