"""Damaged training states and model folders: none is used silently."""

import json
import shutil

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError, read_json
from pretraining.model.checkpoints import check_folder, load_model, read_facts
from pretraining.training import state

ROUNDS = 5  # of each kind of damage to each file


@pytest.fixture(scope="module")
def _whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def job(train, _whole, tmp_path):
    """The folder of a small run with two training states, ZeRO 1, and three model folders."""
    if not (_whole / "job").exists():
        shutil.copytree(train("--save_steps 2,3 --max_steps 4 --zero_stage 1").parent, _whole / "job")
        shutil.rmtree(tmp_path / "job")
    shutil.copytree(_whole / "job", tmp_path / "job")
    return tmp_path / "job"


def truncate(file, rng):
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def overwrite(file, rng):
    content = bytearray(file.read_bytes())
    start = rng.integers(len(content))
    block = rng.bytes(min(64, len(content) - start))
    content[start : start + len(block)] = block
    file.write_bytes(content)


def damages(folder, other, seed):
    """One damage after the other: yields its description when it has been done to `folder`, and undoes it.

    Args:
        other: a folder of the same kind, from which files are swapped.
    """
    rng = np.random.default_rng(seed)
    whole = folder.with_name("." + folder.name)
    shutil.copytree(folder, whole)

    def once(what, damage):
        damage()
        yield what
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)

    for file in sorted(folder.iterdir()):
        for damage in (truncate, flip, overwrite):
            for _ in range(ROUNDS):
                yield from once(f"{damage.__name__} {file.name}", lambda damage=damage, file=file: damage(file, rng))
        yield from once(f"empty {file.name}", lambda file=file: file.write_bytes(b""))
        yield from once(f"remove {file.name}", file.unlink)
        if (other / file.name).read_bytes() != file.read_bytes():
            yield from once(f"swap {file.name}", lambda file=file: shutil.copy(other / file.name, file))
    shutil.rmtree(whole)


def test_damaged_states_are_passed_over_with_a_report(job):
    states = job / "training_state"
    last, before = states / "step0000004", states / "step0000003"
    expected, count, harmless = state.read(last), 0, []
    for what in damages(last, before, seed=1):
        lines = []
        found = state.newest(states, lines.append)
        if found.folder == last and found.saved == expected:
            harmless.append(what)
            continue
        count += 1
        assert found.folder == before and len(lines) == 1 and last.name in lines[0], what
        with pytest.raises(InputError, match="step0000004"):
            state.find(states, "step0000004")
    assert count > 50 and not harmless, (count, harmless)  # no flip hit a space of state.json
    shutil.copy(before / "mp_rank_00_model_states.pt", last / "mp_rank_01_model_states.pt")
    assert state.newest(states, lines.append).folder == before


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("progress", {"step": 3}), ("progress", None), ("arguments", {}), ("model", {}), ("vocabulary_sha256", "0" * 64)),
        *(("precision", "float16"), ("zero_stage", 0), ("world_size", 2), ("files", {}), ("files", None), ("new", 1)),
    ],
)
def test_an_edited_description_is_found(job, entry, value):
    path = job / "training_state" / "step0000004" / "state.json"
    path.write_text(json.dumps({**read_json(path), entry: value}))
    lines = []
    assert state.newest(job / "training_state", lines.append).folder.name == "step0000003"
    assert "step0000004/state.json: damaged" in lines[0]


def test_damaged_models_are_not_loaded(job):
    folder, other = job / "step0000004", job / "step0000003"
    weights, facts, count = load_model(folder).state_dict(), read_facts(folder), 0
    for what in damages(folder, other, seed=2):
        if what == "remove args.json":  # it is a folder as others make them then, and the weights are right
            continue
        count += 1
        with pytest.raises(InputError, match="step0000004"):
            check_folder(folder)
            # All but the tokenizer's files, which are not a part of the model, are looked at when it is loaded.
            assert read_facts(folder) == facts, what
        if what.split()[1] in ("config.json", "model.safetensors"):
            with pytest.raises(InputError, match="step0000004"):
                load_model(folder)
    assert count > 100
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(folder).state_dict().items())


def test_a_run_never_takes_a_damaged_final_model_for_its_own(job, train, capsys):
    file = job / "step0000004" / "model.safetensors"
    whole = file.read_bytes()
    flip(file, np.random.default_rng(3))
    final = train("--save_steps 2,3 --max_steps 4 --zero_stage 1")
    assert final == job / "step0000004" and file.read_bytes() == whole
    assert "going on from" in capsys.readouterr().out
