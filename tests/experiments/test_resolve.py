"""Study files and their mistakes: each is refused with its line before anything runs."""

import re
from pathlib import Path

import pytest

import generate_downstream
from pcfg.common.files import InputError
from pcfg.labels import task_name
from pretraining.experiments.flags import flag_words
from pretraining.experiments.plan import Planner
from pretraining.experiments.resolve import merge, resolve

TINY = Path(__file__).with_name("tiny.toml")
COMPARISON = '[[comparisons]]\nbefore = "base@first"\nafter = "on"\n'


def study(folder, *changes, name="study"):
    """The tiny study with some of its text replaced."""
    text = TINY.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_the_tiny_study():
    design = resolve(TINY, None)
    assert (design.scale, design.selection_seeds, design.label_counts, design.readouts) == (
        "mini",
        (50, 51),
        (20, 40),
        ("ridge",),
    )
    assert (design.base.group, design.base.step) == ("base", 2)
    base, on, adversarial = (design.groups[name] for name in ("base", "on", "adversarial"))
    assert base.seeds == (7, 8) and base.steps == (2, 4) and base.flags["hidden_size"] == 16
    assert base.folders["8@4"] == "models/base/seed8/step0000004"
    assert (on.start.group, on.start.step, on.total(2, design.groups)) == ("base", 2, 4)
    assert on.flags["optimizer_type"] == "sgd" and on.flags["train_micro_batch_size_per_gpu"] == 8
    choice = design.choices["weight"]
    assert (choice.group, choice.flag, choice.values) == ("adversarial", "adversarial_weight", (0.1, 0.2))
    assert adversarial.flags["adversarial_file"] == "{tasks.A}"
    task = design.tasks["A"]
    assert (task.name, task.train_file, task.generate["rule_path"]) == ("pcfg_A", "data/pcfg_A.csv", "rule_mini_headroom.txt")
    [sgd, adversarial] = design.studies[0].comparisons
    assert (sgd.name, sgd.labels, sgd.tasks, sgd.flatness, sgd.primary) == ("base@2 to on", (40,), ("pcfg_A",), "falls", True)
    assert adversarial.before.step == 4 and not adversarial.primary


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('question = "', 'questoin = "', "question: is missing"),
        ("selection_seeds = [50, 51]", "selection_seeds = [8, 51]", "selection_seeds: 8 is one of seeds, too"),
        ("seeds = [7, 8]\n", 'seeds = "7-x"\n', "seeds: is '7-x', must be a list"),
        ('base = "base@first"', 'bose = "base"', "bose: unknown key; did you mean base"),
        ("shard_num = 1", "shard_nmu = 1", "shard_nmu: no key, and no flag of generate_pretraining.py; did you mean shard_num"),
        ("length_limit = 5", 'save_path = "x"', "save_path: a study sets this flag of generate_pretraining.py itself"),
        ("rule_mini_headroom.txt", "rule_mini_headrom.txt", "rule_path: .*rule_mini_headrom.txt: no such grammar file"),
        ("num_hidden_layers = 1", "num_hidden_layers = 1.5", "1.5: must be positive_int .as --num_hidden_layers of run_pretr"),
        ("hidden_dropout_prob = 0\n", "hidden_dropout_prob = 2\n", "2: 2 is not in \\[0, 1\\]"),
        ('lr_schedule = "constant_step"', 'lr_schedule = "constant"', "'constant': must be one of step, constant_step"),
        ("train_batch_size = 8", "seed = 8", "seed: a study sets this flag"),
        ("steps = [2, 4]", "steps = [0, 4]", "steps: must be 1 or more"),
        ('task_type = "A"', 'task_type = "D"', "task_type: 'D': must be one of A, B, C"),
        (
            'task_type = "A"',
            "tsak_type = 'A'",
            "tsak_type: no key, and no flag of generate_downstream.py; did you mean task_type",
        ),
        ("nsamples = 32", "nsample = 32", "nsample: no key, and no flag of calculate_hessian.py; did you mean nsamples"),
        ('readouts = ["ridge"]', 'readouts = ["adamw"]', "'adamw' is no solver of label curves"),
        ("[groups.on]", '[groups."o n"]', "'o n': a name has letters"),
        ("optimizer_type", "optimiser_type", "optimiser_type: no key, and no flag of .*did you mean optimizer_type"),
        ('start = "base@first"', 'start = "bass"', "start: group 'bass' is unknown; did you mean base"),
        ('start = "base@first"', 'start = "base@3"', "start: base@3: base is not measured at step '3'; its steps are 2, 4"),
        ('start = "base@first"', 'start = "on"', "start: on starts from itself"),
        (
            'adversarial_weight = "{weight}"',
            'adversarial_weight = "{wight}"',
            "names no choice and no task; did you mean weight",
        ),
        ('rule = "lowest_accuracy"', 'rule = "lowest"', "rule: 'lowest' is unknown; did you mean lowest_gap"),
        ('task = "A"\n', 'task = "D"\n', "task: task 'D' is unknown"),
        ('after = "on"', 'after = "no"', "after: group 'no' is unknown; there are adversarial, base, on"),
        ('after = "on"', 'after = "base@2"', "after: base at step 2 is compared with itself"),
        ('after = "on"', 'after = "adversarial@2"', "adversarial is not measured at step '2'"),
        (
            'before = "base"\n',
            'before = "base@first"\n',
            "after: base has 2 steps of training, adversarial 4; compare at equal",
        ),
        ('flatness = "falls"', 'flatness = "fells"', "flatness: 'fells' is unknown; did you mean falls"),
        ("primary = true", "primary = 1", "primary: is 1, must be true or false"),
        ("primary = true", "labels = [50]", "labels: 50 is none of the label_counts 20, 40"),
        ("primary = true", 'tasks = ["C"]', "tasks: task 'C' is unknown; there are A"),
        ("primary = true", "primry = true", "primry: unknown key; did you mean primary"),
        ("[measurements.size]", "[measurements.loss]", "loss.json is a record of the project's own"),
        ("{model}/config.json", "config.json", "command: has no {model}"),
    ],
)
def test_mistakes_are_refused_with_their_line(tmp_path, old, new, message):
    path = study(tmp_path, (old, new))
    with pytest.raises(InputError) as error:
        resolve(path, None)
    text = str(error.value)
    assert re.search(message, text) and "\n" not in text
    place, line = text.split(":")[:2]
    # Unequal steps are the mistake of two lines; the second one is named.
    expected = 'after = "adversarial"' if "compare at equal" in message else new.splitlines()[0]
    assert place == str(path) and expected in path.read_text().splitlines()[int(line) - 1]


def test_a_grammar_is_read_before_anything_runs(tmp_path):
    (tmp_path / "own.txt").write_text("S a 0.5\nS b 0.4\n")
    path = study(tmp_path, ("rule_mini_headroom.txt", "own.txt"))
    with pytest.raises(InputError, match=r"study.toml:\d+: rule_path: .*own.txt:1: .* add up to 0.9"):
        resolve(path, None)


def test_groups_without_common_seeds_or_with_other_ones_than_their_start(tmp_path):
    path = study(tmp_path, ("steps = [4]", "steps = [4]\nseeds = [1, 2]"))
    with pytest.raises(InputError, match="base and adversarial have no seed in common"):
        resolve(path, None)
    path = study(tmp_path, ('optimizer_type = "sgd"', "seeds = [7, 9]"))
    with pytest.raises(InputError, match="start: base has no seed 9"):
        resolve(path, None)


def test_a_grid_is_one_line(tmp_path):
    grid = "[groups.grid]\nvary = { lr = [1e-3, 2e-3], optimizer_type = ['adamw', 'sgd'] }\n"
    path = study(tmp_path, ("[groups.base]", grid + "[groups.base]"), ('after = "adversarial"', 'after = "grid-0.002-sgd"'))
    groups = resolve(path, None).groups
    assert [name for name in groups if name.startswith("grid")] == [
        *("grid-0.001-adamw", "grid-0.001-sgd", "grid-0.002-adamw", "grid-0.002-sgd")
    ]
    assert (groups["grid-0.002-sgd"].flags["lr"], groups["grid-0.002-sgd"].flags["optimizer_type"]) == (2e-3, "sgd")
    path = study(tmp_path, ("[groups.base]", grid.replace("lr =", "lrr =") + "[groups.base]"))
    line = path.read_text().splitlines().index(grid.splitlines()[1].replace("lr =", "lrr =")) + 1
    with pytest.raises(InputError, match=f":{line}: lrr: no key"):
        resolve(path, None)


def test_what_an_included_file_offers_is_used_only_if_needed(tmp_path):
    study(tmp_path, name="low")
    path = tmp_path / "mine.toml"
    path.write_text(f'include = "low.toml"\nquestion = "mine"\n{COMPARISON}')
    design = resolve(path, None)
    assert list(design.groups) == ["base", "on"] and not design.choices and list(design.tasks) == ["A"]
    path.write_text(f'include = "low.toml"\nquestion = "mine"\n[groups.own]\nlr = 1\n{COMPARISON}')
    assert set(resolve(path, None).groups) == {"base", "on", "own"}
    path.write_text('include = "low.toml"\nquestion = "mine"\n[[comparisons]]\nbefore = "base"\nafter = "adversarial"')
    assert set(resolve(path, None).choices) == {"weight"}


def test_files_next_to_the_study_and_ones_own_labels(tmp_path):
    (tmp_path / "my_rules.txt").write_text("S A A 1\nA a 1\n")
    for name in ("mine.csv", "mine_validation.csv"):
        (tmp_path / name).write_text("text,label\n")
    own = '[tasks.mine]\ntrain_file = "mine.csv"\nvalidation_file = "mine_validation.csv"\n\n[trace]'
    path = study(tmp_path, ("rule_mini_headroom.txt", "my_rules.txt"), ("[trace]", own))
    design = resolve(path, None)
    assert design.text["rule_path"] == str(tmp_path / "my_rules.txt") == design.tasks["A"].generate["rule_path"]
    task = design.tasks["mine"]
    assert (task.name, task.train_file, task.generate) == ("mine", str(tmp_path / "mine.csv"), {})
    path = study(tmp_path, ("[trace]", own.replace('"mine.csv"', '"none.csv"')))
    with pytest.raises(InputError, match=r":\d+: train_file: .*none.csv: no such file"):
        resolve(path, None)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"task_type": "A"}, "pcfg_A"),
        ({"task_type": "C"}, "pcfg_C"),
        ({"task_type": "span", "span": "1:3"}, "pcfg_span_1-3"),
        ({"task_type": "span", "span": "-2:"}, "pcfg_span_-2-end"),
        ({"task_type": "depth"}, "pcfg_depth"),
    ],
)
def test_tasks_have_the_names_of_their_files(flags, name, tmp_path):
    assert f"pcfg_{task_name(flags['task_type'], flags.get('span'), flags.get('position'))}" == name
    words = flag_words(
        "generate_downstream", {**flags, "rule_path": "rule_mini_headroom.txt", "sentence_num": 5, "validation_num": 2}
    )
    generate_downstream.main([*words, "--save-path", str(tmp_path)])
    assert (tmp_path / f"{name}.csv").exists() and (tmp_path / f"{name}_validation.csv").exists()


def test_studies_of_one_folder_agree(tmp_path):
    paths = [study(tmp_path, name="a"), study(tmp_path, (COMPARISON, COMPARISON + 'claim = "x"\n'), name="b")]
    designs = [resolve(path, None) for path in paths]
    merged = merge(designs, paths)
    assert [part.name for part in merged.studies] == ["a", "b"] and merged.groups == designs[0].groups
    for change, message in (
        (("steps = [4]", "steps = [4]\nlr = 1"), "b.toml: groups.adversarial is not that of .*a.toml; rename it"),
        (("shard_num = 1", "shard_num = 2"), "b.toml: text is .*; run it in another --out"),
    ):
        other = resolve(study(tmp_path, change, name="b"), None)
        with pytest.raises(InputError, match=message):
            merge([designs[0], other], paths)
    with pytest.raises(InputError, match="a second study of the name a; rename the file"):
        merge([designs[0], designs[0]], [paths[0], paths[0]])


def test_texts_without_a_grammar(tmp_path):
    """Folders and files elsewhere than next to the study, the samples' own tokenizer, tasks in GLUE's columns."""
    for part in ("train", "validation"):
        (tmp_path / "data" / "glue").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "glue" / f"{part}.tsv").write_text("question\tsentence\tlabel\n")
    (tmp_path / "studies").mkdir()
    path = tmp_path / "studies" / "own.toml"
    text = """question = "mine"
[language.text]
source = "SOURCE"
dataset = "../data/glue"
[language.samples]
model_name = "own"
[train]
steps = [2]
[models.base]
[groups.base]
[groups.other]
lr = 1e-4
[tasks.pairs]
task_name = "qnli"
train_file = "../data/glue/train.tsv"
validation_file = "../data/glue/validation.tsv"
[[comparisons]]
before = "base"
after = "other"
"""
    path.write_text(text.replace("SOURCE", "corpus"))
    design = resolve(path, None)
    assert design.text["dataset"] == str(tmp_path / "data/glue")
    assert design.groups["base"].flags["tokenizer_name"] == "own"
    task = design.tasks["pairs"]
    assert (task.name, task.train_file) == ("qnli", str(tmp_path / "data/glue/train.tsv"))
    steps, _ = Planner(design, ["python"]).plan()
    commands = {step.name: step.command for step in steps}
    assert "lookup table" not in commands and "test_shard_0.hdf5" in commands["loss of base"]
    assert "--task_name qnli" in commands["ridge pairs of base"]
    path.write_text(text.replace("SOURCE", "opt").replace("dataset", "model_name"))
    steps, _ = Planner(resolve(path, None), ["python"]).plan()
    commands = {step.name: step.command for step in steps}
    assert f"--model-name {tmp_path}/data/glue" in commands["lookup table"]
    assert "--condprobfile" in commands["loss of base"] and "test0.txt" in commands["trace of base"]
    assert not any("conditional" in step.words for step in steps)  # no lookup table of the tasks' sentences
    path.write_text(text.replace("SOURCE", "corpus").replace("qnli", "qnl"))
    with pytest.raises(InputError, match="task_name: 'qnl' is unknown; did you mean qnli"):
        resolve(path, None)
