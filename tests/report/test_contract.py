"""The files between the experiments' runner and the report: what is written is read again, and what is wrong is named."""

import json

import pydantic
import pytest

from pcfg.common.files import InputError
from pretraining.report import contract as experiments
from pretraining.report.contract import Choice, Command, Entry, Experiment, Experiments, Status, Weight


def whole() -> Experiments:
    small = Entry(group="small", seed=0, step=10, folder="models/small", common={"tables": "big/tables", "head": "big/head"})
    table = Entry(group="lookup table", seed=None, step=None, folder="models/lookup_table")
    return Experiments(
        scale="mini",
        seeds=(0, 1),
        tasks=("A", "B"),
        finetune_tasks=("B",),
        saturated=0.02,
        margin=0.01,
        reference="models/small",
        experiments=(
            Experiment(name="sizes", entries=(small,)),
            Experiment(name="algorithms", entries=(small, table), choice="adversarial/choice.json"),
        ),
        commands=(
            Command(name="train", command="python run_pretraining.py", makes=("models/small",)),
            Command(name="trace", command="python calculate_hessian.py", makes=("models/small/hessian.json",)),
        ),
    )


def test_what_is_written_is_read_again(tmp_path):
    experiments.write_experiments(tmp_path, whole())
    assert experiments.read_experiments(tmp_path) == whole()
    assert "common" not in json.loads((tmp_path / "experiments.json").read_text())["experiments"][1]["entries"][1]
    statuses = {
        "train": Status(state="failed", exit_code=1, seconds=2.5, log="logs/train.log"),
        "trace": Status(state="blocked"),
    }
    experiments.write_statuses(tmp_path, statuses)
    assert experiments.read_statuses(tmp_path) == statuses
    tried = Weight(weight=0.1, gap_increase=0.01, gap_increase_se=None, accuracy=0.5, accuracy_se=0.01, standard_accuracy=0.6)
    choice = Choice(criterion="lowest accuracy", gap_allowed=0.02, weights=(tried,), chosen=0.1)
    experiments.write_choice(tmp_path / "choice.json", choice)
    assert experiments.read_choice(tmp_path / "choice.json") == choice


def test_files_that_are_not_there(tmp_path):
    assert experiments.read_experiments(tmp_path) is None and experiments.read_statuses(tmp_path) == {}


def test_the_command_that_makes_a_file_is_found():
    assert [command.name for command in whole().makers("models/small")] == ["train"]
    assert [command.name for command in whole().makers("models/small/hessian.json")] == ["trace"]
    assert [command.name for command in whole().makers("models/small/loss.json")] == ["train"]
    assert whole().makers("models/other") == []


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["schema"], 2, "'schema' is 2, not 1"),
        (["saturated"], 0, "'saturated': Input should be greater than 0, not 0"),
        (["seeds"], [0, 0], r"'seeds': .*must not list an entry twice, not \[0, 0\]"),
        (["reference"], "/models", "'reference': .*must be a path below the folder of the file, not '/models'"),
        (["finetune_tasks"], ["C"], "finetune_tasks has 'C', which tasks lacks"),
        (["extra"], 1, "'extra': Extra inputs are not permitted, not 1"),
        (["experiments", 0, "name"], "colours", "'experiments.0': .*name 'colours' is none of steps, sizes, algorithms"),
        (["experiments", 0, "name"], "algorithms", "experiment 'algorithms' occurs more than once"),
        (["experiments", 0, "entries"], [], "'experiments.0.entries': .*at least 1 item"),
        (["experiments", 1, "entries", 1, "folder"], "../up", "'experiments.1.entries.1.folder': .*not '../up'"),
        (
            ["experiments", 0, "entries", 0, "common"],
            {"both": "x"},
            r"0.common.both.*': String should match .*\(tables\|head\).*, not 'both'",
        ),
        (["experiments", 0, "entries", 0, "seed"], 5, "seed 5, which seeds lacks"),
        (["commands", 1, "name"], "train", "command 'train' occurs more than once"),
        (["commands", 0, "makes"], "models", "'commands.0.makes': Input should be a valid array, not 'models'"),
    ],
)
def test_errors_name_the_field(tmp_path, path, value, message):
    experiments.write_experiments(tmp_path, whole())
    content = json.loads((tmp_path / "experiments.json").read_text())
    *parents, last = path
    part = content
    for step in parents:
        part = part[step]
    part[last] = value
    (tmp_path / "experiments.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"experiments.json: .*{message}.*; correct the file"):
        experiments.read_experiments(tmp_path)


def test_missing_fields_and_damaged_files(tmp_path):
    experiments.write_experiments(tmp_path, whole())
    content = json.loads((tmp_path / "experiments.json").read_text())
    del content["margin"]
    (tmp_path / "experiments.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="'margin': Field required"):
        experiments.read_experiments(tmp_path)
    (tmp_path / "experiments.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        experiments.read_experiments(tmp_path)
    (tmp_path / "status.json").write_text('{"train": {"state": "lost"}}')
    with pytest.raises(InputError, match="command 'train': 'state': Input should be 'done', 'failed', .*, not 'lost'"):
        experiments.read_statuses(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        experiments.read_choice(tmp_path / "choice.json")


def test_nothing_wrong_can_be_built():
    with pytest.raises(pydantic.ValidationError, match="margin"):
        Experiments(**{**dict(whole()), "margin": -1.0})
    with pytest.raises(pydantic.ValidationError, match="log"):
        Status(state="done", log="/x")


def test_files_from_before_the_criterion_are_read(tmp_path):
    tried = {"weight": 0.1, "gap_increase": 0.01, "gap_increase_se": None, "accuracy": 0.5, "accuracy_se": None}
    choice = {"schema": 1, "criterion": "lowest", "gap_allowed": 0.02, "weights": [{**tried, "standard_accuracy": 0.6}]}
    (tmp_path / "choice.json").write_text(json.dumps({**choice, "chosen": None}))
    assert experiments.read_choice(tmp_path / "choice.json").weights[0].same_loss is None
