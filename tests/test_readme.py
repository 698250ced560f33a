"""The README is true: its file tree is the project's, and its commands' flags exist."""

import importlib
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


@pytest.mark.parametrize("words", commands(), ids=lambda words: next(w for w in words if "run" in w or "." in w))
def test_the_commands_flags_exist(words):
    if words[1] == "-m":
        script, arguments = words[2], words[3:]
    else:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, arguments = words[at].removesuffix(".py"), words[at + 1 :]
    # placeholders of numbers
    importlib.import_module(script).build_parser().parse_args(["2" if word == "K" else word for word in arguments])


def test_there_is_a_command_for_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {word for words in commands() for word in words if word.endswith(".py")}


def test_the_loss_and_the_trace_have_their_own_commands():
    trace = README.split("### Trace of Hessian")[1].split("###")[0]
    assert "python calculate_hessian.py" in trace and "calculate_loss" not in trace
