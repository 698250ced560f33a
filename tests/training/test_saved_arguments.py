import json

import pytest

from pcfg.common.files import InputError, write_sealed
from pretraining.training.arguments import OF_ONE_START, build_parser, parse_with_config

FIRST = (
    "--dataset_path data --tokenizer_name t --output_dir out --job_name first --lr 3e-4 --save_steps 4,0 --fp16 --max_steps 9"
)


def parse(text):
    return parse_with_config(build_parser(""), text.split())


@pytest.fixture
def config(tmp_path):
    """Writes an args.json with some arguments changed; returns the flag that names it."""

    def write(**changes):
        arguments = {**vars(parse(FIRST)), **changes}
        (tmp_path / "args.json").write_text(json.dumps({"step": 4, "arguments": arguments}))
        return f"--config {tmp_path}/args.json"

    return write


def test_a_saved_run_is_given_back(config):
    expected = vars(parse(FIRST))
    got = vars(parse(config()))
    assert {**got, "config": None} == expected
    assert got["save_steps"] == [0, 4] and got["fp16"] is True and got["dataset_path"] == "data"


def test_flags_win(config):
    options = parse(f"{config()} --job_name second --lr 1 --fp16 false --save_steps 7 --max_steps 3")
    assert (options.job_name, options.lr, options.fp16, options.save_steps, options.max_steps) == ("second", 1.0, False, [7], 3)
    assert (options.output_dir, options.num_hidden_layers) == ("out", 24)


def test_what_belongs_to_one_start_is_left(config):
    options = parse(config(overwrite=True, local_rank=3, resume="never", config="other.json"))
    assert (options.overwrite, options.local_rank, options.resume) == (False, -1, "auto")
    assert vars(options).keys() >= OF_ONE_START


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", "fast"), ("lr", "0.1"), ("lr", [0.1]), ("lr", None), ("lr", True), ("hidden_size", 12.5), ("hidden_size", -1)),
        *(("fp16", "true"), ("fp16", 1), ("curve", "round"), ("job_name", 3), ("save_steps", [3, 1])),
        *(("save_steps", 3), ("save_steps", ["a"]), ("dataset_path", None), ("seed", {"a": 1})),
    ],
)
def test_impossible_values_are_named(config, name, value):
    with pytest.raises(InputError, match=f"args.json: '{name}' can't be .*; correct it, or give --{name}"):
        parse(config(**{name: value}))


def test_unknown_entries_and_other_files_are_named(config, tmp_path):
    with pytest.raises(InputError, match="args.json: 'speed' is no flag of run_pretraining.py"):
        parse(config(speed=3))
    (tmp_path / "args.json").write_text('{"step": 3}')
    with pytest.raises(InputError, match="args.json: has no 'arguments'; give the args.json of a model folder"):
        parse(f"--config {tmp_path}/args.json")
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        parse("--config nowhere.json")


def test_a_damaged_file_is_refused_and_an_edited_copy_is_taken(tmp_path):
    write_sealed(tmp_path / "args.json", {"arguments": vars(parse(FIRST))})
    assert parse(f"--config {tmp_path}/args.json").lr == 3e-4
    text = (tmp_path / "args.json").read_text().replace("0.0003", "0.0007")
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(InputError, match="args.json: damaged"):
        parse(f"--config {tmp_path}/args.json")
    (tmp_path / "mine.json").write_text(text)
    assert parse(f"--config {tmp_path}/mine.json").lr == 7e-4


def test_required_flags_are_still_required():
    with pytest.raises(SystemExit):
        parse("--dataset_path data")
