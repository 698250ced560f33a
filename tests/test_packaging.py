"""`pip install -e .` installs the packages with their data and no script, and what the scripts leave is not in git's way."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROSE = {"and", "names", "LOOKUP"}  # what follows such a flag in a sentence; a single letter is a placeholder
OUTPUT = re.compile(r"(?:--save-path|--output_dir|--out|--dir|-o|--output)[ =]([A-Za-z][\w./-]+)")
DEFAULT_FOLDER = re.compile(r"^ *(?:out|folder)=\$\{\d:-(.+)\}$", re.MULTILINE)


def git(*arguments, **options):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, **options).stdout.splitlines()


def copy_of_the_project(folder):
    for path in git("ls-files", check=True):
        if not path.startswith("tests/") and (ROOT / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)


def test_a_wheel_has_the_packages_with_their_data_and_no_script(tmp_path):
    copy_of_the_project(tmp_path)
    expected = {path for path in git("ls-files", check=True) if path.startswith(("pcfg/", "pretraining/"))}
    expected = {path for path in expected if (ROOT / path).exists() and not path.endswith("README.md")}
    assert any(path.endswith(".jinja") for path in expected) and "pcfg/rules/rule_mini_mlm.txt" in expected
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        required = re.findall(r"^Requires-Dist: (.*)$", file.read(metadata).decode(), re.MULTILINE)
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert required and set(required) < set((ROOT / "requirements.txt").read_text().splitlines())


@pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="an environment takes seconds to make; LONG_TESTS=1")
def test_an_editable_installation_is_importable_from_anywhere(tmp_path):
    copy_of_the_project(tmp_path / "project")
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv"], check=True)
    (packages,) = {path for path in sys.path if path.endswith("site-packages")}
    python = tmp_path / "venv" / "bin" / "python"
    environment = os.environ | {"PYTHONPATH": packages}
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    subprocess.run(install, cwd=tmp_path / "project", env=environment, check=True, capture_output=True)
    code = "import importlib.util, pcfg.grammar as g, pretraining.report.page as p; print(g.RULES_FOLDER, p.__file__)\n"
    code += "g.Grammar.read(g.find_rules('rule_mini_mlm.txt')); print(importlib.util.find_spec('run_lp'))"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/project/pcfg/rules {tmp_path}/project/pretraining/report/page.py" and lines[-1] == "None"


def test_git_ignores_what_the_documented_commands_leave():
    tracked = set(git("ls-files", check=True))
    left = {"wandb/run", "slurm-1.out", "pcfg_pretraining.egg-info/PKG-INFO", "build/lib", "pcfg/__pycache__/a.pyc"}
    for path in tracked:
        if path.endswith((".md", ".py", ".sh", ".sbatch")) and not path.startswith("tests/") and (ROOT / path).exists():
            text = (ROOT / path).read_text()
            left |= set(OUTPUT.findall(text)) - PROSE
            left |= {folder.replace("${name}", "bookcorpus") for folder in DEFAULT_FOLDER.findall(text)}
    assert {"pcfg_dataset", "quickstart", "opt_small", "bookcorpus_dataset", "OUT"} <= left
    # the shipped grammars are in git; a folder is ignored with what is in it
    files = {path if "." in path.split("/")[-1] else f"{path}/file" for path in left - tracked}
    assert files - set(git("check-ignore", "--no-index", *files)) == set()
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard", check=True) == []
