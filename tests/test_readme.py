"""The README is true: its file tree is the project's, and its commands' flags exist."""

import importlib
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def tree_paths() -> set[str]:
    """The paths named in the README's file tree."""
    block = re.search(r"```\n(generate_pretraining\.py .*?)```", README, re.S)[1]
    paths, folders = set(), []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 4]
        if name.endswith("/"):
            folders.append(name)
            paths.add("".join(folders))
        else:
            paths.add("".join(folders) + name)
    return paths


def test_the_file_tree_is_the_projects():
    named = tree_paths()
    assert all((ROOT / path).exists() for path in named), [path for path in named if not (ROOT / path).exists()]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {path for path in listed if path.endswith((".py", ".sh")) and not path.startswith("tests/")}
    assert code - named - {path for path in code if path.endswith("__init__.py")} == set()


def commands() -> list[list[str]]:
    """The README's commands that start a script of ours, as words."""
    lines = re.sub(r"\\\n\s*", " ", README).splitlines()
    return [shlex.split(line) for line in lines if re.match(r"    (python|deepspeed) ", line)]


def module_and_arguments(words: list[str]) -> tuple:
    """The module that a command starts, and what it is given."""
    if words[1] == "-m":
        module = importlib.import_module(words[2])
        # A package's __main__.py would start it; its command.py is what that calls.
        return importlib.import_module(f"{words[2]}.command") if hasattr(module, "__path__") else module, words[3:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return importlib.import_module(words[at].removesuffix(".py")), words[at + 1 :]


@pytest.mark.parametrize("words", commands(), ids=lambda words: next(w for w in words if "run" in w or "." in w))
def test_the_commands_flags_exist(words):
    module, arguments = module_and_arguments(words)
    numbers = ["2" if word == "K" else word for word in arguments]  # K is a placeholder
    source = [after for word, after in itertools.pairwise(numbers) if word == "--source"]  # each has its own parser
    assert vars(module.build_parser(*source).parse_args(numbers))


def test_the_dataset_commands_run(tmp_path, monkeypatch, capsys):
    """As they are written, but for the number of sentences of pre-training."""
    monkeypatch.chdir(tmp_path)
    sizes = "--sentence-num 500 --shard-num 2 --test-shard-num 1 --test-sentence-num 50".split()
    for words in commands():
        module, arguments = module_and_arguments(words)
        if "--source" in words:
            continue  # a hub's model: tests/sources
        if module.__name__.startswith(("generate_", "pcfg.lookup")):
            module.main([*arguments, *(sizes if module.__name__ == "generate_pretraining" else [])])
    assert "rule_deep_mlm.txt: shipped grammar, not the paper's; entropy 4.517" in capsys.readouterr().out
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    shards = {f"pcfg_dataset/pretraining/train_shard_{k}.hdf5" for k in range(10)}
    assert shards | {"pcfg_dataset/vocab.txt", "pcfg_dataset/pcfg_B.csv", "pcfg_dataset/lookup.hdf5"} <= made


def test_there_is_a_command_for_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {word for words in commands() for word in words if word.endswith(".py")}


def test_the_loss_and_the_trace_have_their_own_commands():
    trace = README.split("### Trace of Hessian")[1].split("###")[0]
    assert "python calculate_hessian.py" in trace and "calculate_loss" not in trace
