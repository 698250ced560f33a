"""The files between the experiments' runner and the report: what is written is read again, and what is wrong is named."""

import json

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
        (["schema"], 2, "'schema' is not 1"),
        (["saturated"], 0, "'saturated' is 0, not a positive number"),
        (["seeds"], [0, 0], "'seeds' is .*different integers"),
        (["reference"], "/models", "'reference' is '/models', not a folder below"),
        (["finetune_tasks"], ["C"], "'finetune_tasks' has 'C'"),
        (["extra"], 1, "unknown field 'extra'"),
        (["experiments", 0, "name"], "colours", "experiments number 1: 'name' is 'colours'"),
        (["experiments", 0, "name"], "algorithms", "experiment 'algorithms' is there more than once"),
        (["experiments", 0, "entries"], [], "'entries' is .*one at least"),
        (["experiments", 1, "entries", 1, "folder"], "../up", "entries number 2: 'folder' is '../up'"),
        (["experiments", 0, "entries", 0, "common"], {"both": "x"}, "'common' is .*tables, head"),
        (["experiments", 0, "entries", 0, "seed"], 5, "seed 5, which 'seeds' has not"),
        (["commands", 1, "name"], "train", "command 'train' is there more than once"),
        (["commands", 0, "makes"], "models", "commands number 1: 'makes' is 'models'"),
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
    with pytest.raises(InputError, match=message):
        experiments.read_experiments(tmp_path)


def test_missing_fields_and_damaged_files(tmp_path):
    experiments.write_experiments(tmp_path, whole())
    content = json.loads((tmp_path / "experiments.json").read_text())
    del content["margin"]
    (tmp_path / "experiments.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has no 'margin'; it needs a positive number of nats"):
        experiments.read_experiments(tmp_path)
    (tmp_path / "experiments.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        experiments.read_experiments(tmp_path)
    (tmp_path / "status.json").write_text('{"train": {"state": "lost"}}')
    with pytest.raises(InputError, match="command 'train': 'state' is 'lost', not one of done, failed"):
        experiments.read_statuses(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        experiments.read_choice(tmp_path / "choice.json")


def test_nothing_wrong_is_written(tmp_path):
    wrong = Experiments(**{**vars(whole()), "margin": -1.0})
    with pytest.raises(InputError, match="'margin' is -1.0"):
        experiments.write_experiments(tmp_path, wrong)
    with pytest.raises(InputError, match="'log' is '/x'"):
        experiments.write_statuses(tmp_path, {"train": Status(state="done", log="/x")})
    assert not list(tmp_path.iterdir())
