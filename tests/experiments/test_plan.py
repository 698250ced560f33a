"""The plans of studies: what commands depend on, and that every script knows its flags."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from pcfg.common.files import InputError
from pretraining.evaluation.downstream import parse_arguments
from pretraining.experiments import __main__ as experiments
from pretraining.experiments.plan import Planner, Step, fingerprint
from pretraining.experiments.resolve import resolve
from pretraining.experiments.study import Registration, Status, read_studies, write_statuses, write_studies
from pretraining.training.arguments import parse_with_config

TINY = Path(__file__).with_name("tiny.toml")
ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "scripts/studies"


def plan(path=TINY, scale=None, launcher=("python",), **changes):
    return Planner(dataclasses.replace(resolve(path, scale), **changes), list(launcher)).plan()


def check_order(steps):
    """Nothing depends on what comes later, and what a command reads below OUT was made before."""
    seen, makes = set(), set()
    for step in steps:
        assert step.name not in seen
        assert {*step.needs, *step.after} <= seen, step.name
        for path in re.findall(r"\$OUT/([^\"]+)", step.command):
            paths = [path.replace("seed{seed}", f"seed{seed}") for seed in (7, 8, 50, 51)] if "{seed}" in path else [path]
            makers = {*makes, *step.all_makes}
            known = [
                any(other == made or f"{made}/".startswith(f"{other}/") or other.startswith(f"{made}/") for made in makers)
                for other in paths
            ]
            # The output folder of stacked runs is above all that they make.
            assert path.split("/")[0] == "data" or any(known), (step.name, path)
        seen.add(step.name)
        makes |= {*step.makes, *(folder for folder, _ in step.records)}
    return seen, makes


def check_flags(steps):
    """Every script takes the words of its commands."""
    parsers = {}
    for step in steps:
        words = [word.replace("{weight}", "0.5").replace("{rho}", "0.5") for word in step.words]
        if words[0] == "cp":  # the author's own measurement
            continue
        assert words[0] == "python"
        script, arguments = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
        source = arguments[arguments.index("--source") + 1 :][:1] if "--source" in arguments else ()
        parser = parsers.setdefault(script, importlib.import_module(script).build_parser(*source))
        if script in ("run_lp", "run_ft"):
            parse_arguments(parser, [*arguments, "--use_cpu"])
        elif script == "run_pretraining":
            options = parse_with_config(parser, arguments)
            assert bool(options.adversarial_file) == ("adversarial" in step.name or "weight" in step.name)
        else:
            parser.parse_args(arguments)
    return parsers


@pytest.mark.parametrize("stacked", [False, True])
def test_nothing_depends_on_what_comes_later_and_every_model_is_measured(stacked, tmp_path):
    steps, studies = plan(stacked=stacked)
    _, makes = check_order(steps)
    records = {path for step in steps for path in step.all_makes}
    for group in studies.groups.values():
        for folder in group.folders.values():
            assert folder in makes
            for file in ("loss.json", "hessian.json", "curve_pcfg_A_ridge.json", "size.json"):
                assert f"{folder}/{file}" in records and studies.commands[f"{folder}/{file}"]
    hutchinson = {path for path in records if "hutchinson" in path}
    assert hutchinson == {
        f"{group.folders[f'7@{step}']}/hessian_hutchinson.json" for group in studies.groups.values() for step in group.steps
    }
    for control in studies.controls:
        assert all(f"{folder}/curve_pcfg_A_ridge.json" in records for folder in control.folders)
    assert studies.controls[0].folders == tuple(f"selection/base/seed{seed}/step0000000" for seed in (50, 51))
    assert studies.selection.seeds == (50, 51) and set(studies.selection.folders.values()) <= makes
    write_studies(tmp_path, studies)
    assert read_studies(tmp_path) == studies


def test_scripts_know_their_flags():
    parsers = check_flags(plan(stacked=False)[0])
    assert parsers.keys() >= {"generate_pretraining", "generate_samples", "generate_downstream", "calculate_loss", "run_lp"}
    assert parsers.keys() >= {"pcfg.lookup", "pretraining.experiments.choose", "calculate_hessian", "run_pretraining"}


def test_one_process_per_seed_or_for_all_seeds():
    commands = {step.name: step for step in plan()[0]}
    on = commands["train on seed 8"]
    assert '--model_name_or_path "$OUT/models/base/seed8/step0000002"' in on.command and on.needs[-1] == "train base seed 8"
    assert on.command.endswith('--seed 8 --output_dir "$OUT/models/on" --job_name seed8')
    stacked = {step.name: step for step in plan(stacked=True)[0]}
    on = stacked["train on"]
    assert '--model_name_or_path "$OUT/models/base/seed{seed}/step0000002"' in on.command and on.needs[-1] == "train base"
    assert on.command.endswith('--seeds 7,8 --output_dir "$OUT/models" --job_name on')
    assert on.makes == ("models/on/seed7/step0000002", "models/on/seed8/step0000002")
    # What a choice admits is known only when the group starts.
    adversarial = stacked["train adversarial"]
    assert adversarial.choices == ("weight",) and {"choice weight", "task A"} <= {*adversarial.needs}
    assert "--adversarial_weight '{weight}'" in adversarial.command
    candidate = stacked["train choices/weight 0.1"]
    assert "--adversarial_weight 0.1 " in candidate.command and "--seeds 50,51" in candidate.command and not candidate.choices
    assert "train selection base" in stacked and "--save_steps 0,2,4" in stacked["train selection base"].command


def test_branches_are_measured_where_the_rate_is_constant():
    design = resolve(TINY, None)
    flags = {"lr_schedule": "wsd"}
    groups = {name: group.model_copy(update={"flags": group.flags | flags}) for name, group in design.groups.items()}
    steps, _ = plan(groups=groups)
    commands = {step.name: step for step in steps}
    assert commands["train base seed 7"].makes == (
        "models/base/seed7/step0000002-cooled",
        "models/base/seed7/step0000004-cooled",
    )
    assert "--max_steps 4 --branch_steps 2,4 --seed" in commands["train base seed 7"].command
    assert "--branch_steps 2,4 --save_steps 0 " in commands["train selection base seed 50"].command
    assert "selection/base/seed50/step0000000" in commands["train selection base seed 50"].makes
    assert '"$OUT/models/base/seed7/step0000002-cooled"' in commands["train on seed 7"].command


def test_the_launcher_starts_pre_training_and_nothing_else():
    for step in plan(launcher=("deepspeed", "--hostfile", "my hosts"))[0]:
        assert step.command.startswith("deepspeed --hostfile 'my hosts' run_pretraining.py") == step.name.startswith("train ")


def test_the_hash_is_of_the_resolved_study(tmp_path):
    design = experiments.read_designs([TINY], None)
    [study] = design.studies
    assert len(study.sha256) == 64
    same = tmp_path / "tiny.toml"
    same.write_text("# another comment\n" + TINY.read_text().replace("[2, 4]", "[4,2]"))
    assert experiments.read_designs([same], None).studies[0].sha256 == study.sha256
    same.write_text(TINY.read_text().replace("label_counts = [20, 40]", "label_counts = [40, 60]"))
    other = experiments.read_designs([same], None).studies[0].sha256
    assert other != study.sha256
    assert fingerprint(plan()[1]) == fingerprint(plan()[1])


def test_what_is_fixed_beforehand(tmp_path):
    design = experiments.read_designs([TINY], None)
    _, studies = Planner(design, ["python"]).plan()
    first = experiments.register(studies, tmp_path)
    [registration] = first.registrations
    assert registration.accuracies == 0 and registration.sha256 == {"tiny": design.studies[0].sha256}
    assert experiments.register(first, tmp_path) == first
    folder = tmp_path / studies.groups["base"].folders["7@2"]
    folder.mkdir(parents=True)
    for name in ("curve_pcfg_A_ridge.json", "probe_pcfg_A.json", "loss.json"):
        (folder / name).touch()
    changed = first.model_copy(update={"studies": (first.studies[0].model_copy(update={"sha256": "1" * 64}),)})
    second = experiments.register(changed, tmp_path)
    assert second.registrations[0] == registration and isinstance(registration, Registration)
    assert second.registrations[1].accuracies == 2 and second.registrations[1].sha256 == {"tiny": "1" * 64}


def test_studies_that_follow_each_other_in_one_folder(tmp_path):
    _, first = plan()
    write_studies(tmp_path, first)
    other = tmp_path / "other.toml"
    other.write_text(f'include = "{TINY}"\nquestion = "Another?"\n[[comparisons]]\nbefore = "base@first"\nafter = "on"\n')
    both = experiments.with_others(plan(other)[1], first, tmp_path)
    assert [study.name for study in both.studies] == ["other", "tiny"]
    assert set(both.groups) == {"base", "on", "adversarial"} and [choice.name for choice in both.choices] == ["weight"]
    # The same study again replaces itself.
    assert experiments.with_others(first, both, tmp_path).studies[0].name == "tiny"
    # Models on the disk are not those of other flags.
    changed = tmp_path / "changed.toml"
    changed.write_text(TINY.read_text().replace("train_batch_size = 8", "train_batch_size = 4"))
    experiments.with_others(plan(changed)[1], None, tmp_path)
    (tmp_path / "models/base/seed7/step0000002").mkdir(parents=True)
    with pytest.raises(
        InputError,
        match=r"seed7/step0000002: was made with other flags \(--train_batch_size was 8, now 4, --.*\); give another --out",
    ):
        experiments.with_others(plan(changed)[1], first, tmp_path)
    changed.write_text(TINY.read_text().replace("shard_num = 1", "shard_num = 2"))
    with pytest.raises(InputError, match=r"text of its study tiny is .*; give another --out"):
        experiments.with_others(plan(changed)[1], first, tmp_path)


def test_results_of_the_former_experiments_are_refused(tmp_path):
    (tmp_path / "experiments.json").write_text("{}")
    with pytest.raises(InputError, match=r"results of the former reproduce_\*.sh .* give another --out"):
        experiments.main([str(TINY), "--out", str(tmp_path), "--dry-run"])


def test_dry_run_says_what_exists_and_does_nothing(tmp_path, capsys):
    experiments.main([str(TINY), "--out", str(tmp_path / "out"), "--dry-run"])
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "primary: base at step 2 against on at step 2" in text
    assert f"on: seeds 7, 8, steps 2, from base at step 2; 0 of 2 models in {tmp_path}/out/models/on" in text
    steps, studies = plan()
    training = [step for step in steps if step.stage == "training"]
    assert re.search(rf"^training +{len(training)} +0  0 of 8$", text, re.M)
    for folder in training[0].makes:
        (tmp_path / folder).mkdir(parents=True)
    write_statuses(tmp_path, {training[0].name: Status(state="done", seconds=61.0)})
    text = experiments.describe(steps, studies, tmp_path)
    assert re.search(rf"^training +{len(training)} +1  2 of 8, 0:01:01 one after another$", text, re.M)


def test_a_command_shows_its_folder():
    step = Step(name="x", words=("python", "a b", "$OUT/c"), makes=("c",))
    assert step.command == "python 'a b' \"$OUT/c\"" and step.all_makes == ("c",)


WITH_DATA = ("natural", "language_model")  # of the user's own


@pytest.mark.parametrize("scale", [None, "small", "paper"])
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_studies(path, scale):
    if path.stem in WITH_DATA:
        pytest.skip("tested below")
    if path.stem == "mini":
        with pytest.raises(InputError, match="question: is missing"):
            resolve(path, scale)
        return
    steps, studies = plan(path, scale)
    assert check_flags(steps)
    seen = set()
    for step in steps:
        assert step.name not in seen and {*step.needs, *step.after} <= seen, step.name
        seen.add(step.name)
    assert studies.stacked == (scale is None) and all(group.folders for group in studies.groups.values())
    seeds, selection_seeds = (108, 1008) if path.stem == "quickstart" else (100, 1000)
    assert set(range(seeds, seeds + 8)) >= {*studies.groups["base"].seeds} and studies.selection.seeds[0] == selection_seeds
    for group in studies.groups.values():  # widths have a place in the widest
        assert group.flags["hidden_size"] // group.flags["num_attention_heads"] == 16 * (1 if scale is None else 4)


def lay_out(folder, inputs):
    """Empty inputs of a study: a folder where a name ends with a slash, else a labelled file."""
    for name in inputs:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("text,label\n")


@pytest.mark.parametrize(
    ("name", "scale", "inputs", "text"),
    [
        (
            *("natural", None),
            [f"natural/{task}{part}" for task in ("genre", "tag3") for part in (".csv", "_validation.csv")]
            + ["natural/sst2.tsv", "natural/sst2_validation.tsv", "natural/vocab.txt", "natural/text/"],
            {"dataset": "natural/text", "vocab_file": "natural/vocab.txt"},
        ),
        (
            *("language_model", None),
            ["lm/model/", *(f"lm/{task}/{part}.csv" for task in ("sst2", "qnli") for part in ("train", "validation"))],
            {"model_name": "lm/model"},
        ),
        *(
            (
                *("language_model", scale),
                ["lm/opt-125m/", *(f"lm/glue/{task}/{part}.tsv" for task in ("SST-2", "QNLI") for part in ("train", "dev"))],
                {"model_name": "lm/opt-125m"},
            )
            for scale in ("small", "paper")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_studies_of_the_users_own_data(name, scale, inputs, text, tmp_path):
    path = tmp_path / "scripts/studies" / f"{name}.toml"
    path.parent.mkdir(parents=True)
    path.write_text((STUDIES / path.name).read_text())
    with pytest.raises(
        InputError, match=rf"{name}.toml:\d+: train_file: .*: no such file; paths are relative to the study file"
    ):
        resolve(path, scale)
    lay_out(tmp_path, inputs)
    design = resolve(path, scale)
    assert {key: design.text[key] for key in text} == {key: str(tmp_path / value) for key, value in text.items()}
    files = {file for task in design.tasks.values() for file in (task.train_file, task.validation_file)}
    assert files == {str(tmp_path / name) for name in inputs if "." in name and "vocab" not in name}
    steps, studies = plan(path, scale)
    check_flags(steps)
    assert [control.name for control in studies.controls] == ["untrained", "words"]
    assert ("lookup table" in {step.name for step in steps}) == (name == "language_model")


DROPOUT = f"""
question = "Does dropout change the flatness at the same loss?"
include = "{STUDIES / "mini.toml"}"
seeds = "0-3"

[language.text]
rule_path = "my_rules.txt"

[groups.dropout]
vary = {{ hidden_dropout_prob = [0, 0.1] }}

[[comparisons]]
before = "dropout-0"
after = "dropout-0.1"
"""


def test_a_question_of_ones_own_in_a_few_lines(tmp_path, capsys):
    assert DROPOUT.count("\n") <= 25
    rules = (ROOT / "pcfg/rules/rule_mini_headroom.txt").read_text()
    (tmp_path / "my_rules.txt").write_text(rules)
    (tmp_path / "dropout.toml").write_text(DROPOUT)
    experiments.main([str(tmp_path / "dropout.toml"), "--out", str(tmp_path / "out"), "--dry-run"])
    text = capsys.readouterr().out
    assert "primary: dropout-0 at step 8000 against dropout-0.1 at step 8000" in text and "sgd" not in text
    steps, studies = plan(tmp_path / "dropout.toml")
    check_flags(steps)
    assert set(studies.groups) == {"dropout-0", "dropout-0.1"} and studies.studies[0].paper is None
    assert studies.text["rule_path"] == str(tmp_path / "my_rules.txt")
    assert [studies.groups[f"dropout-{value}"].flags["hidden_dropout_prob"] for value in (0, 0.1)] == [0, 0.1]
