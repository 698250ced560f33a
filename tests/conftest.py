"""Small artefacts that many tests need, made once a session through the project's own scripts."""

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at a time

import torch

# Three binary levels, early words on two of them: sentences of 4 to 8 words.
RULES = """\
S S1 0.4
S S2 0.35
S S3 0.25
S1 A0 A1 1.0
S2 A1 A0 1.0
S3 A2 A2 1.0
A0 B0 B1 0.6
A0 B1 B1 0.4
A1 B1 B2 0.7
A1 cat 0.3
A2 B2 B0 0.5
A2 B0 B0 0.5
B0 C0 C1 0.8
B0 dog 0.2
B1 C1 C2 0.9
B1 C2 C0 0.1
B2 C2 C2 0.5
B2 C0 C1 0.5
C0 cat 0.3
C0 bird 0.3
C0 fish 0.4
C1 dog 0.5
C1 tree 0.25
C1 house 0.25
C2 river 0.6
C2 stone 0.3
C2 bird 0.1
"""

# The files with tests of minutes, the longest first.
LONGEST = ("test_quickstart.py", "test_reproduce.py", "test_prepare.py")
# What programs import; the fork server of the end-to-end tests imports it once.
PROGRAMS = "generate_samples calculate_loss calculate_hessian run_lp run_ft run_pretraining enlarge pretraining.report.command"


def pytest_collection_modifyitems(config, items):
    """Each worker begins with its share of the longest tests: begun last, they would leave the other cores without work.

    `--dist worksteal` gives each worker a run of consecutive tests at the start.
    """
    longest = sorted((item for item in items if item.path.name in LONGEST), key=lambda item: LONGEST.index(item.path.name))
    others = [item for item in items if item.path.name not in LONGEST]
    workers = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    number = len(items)
    items.clear()
    for worker in range(workers):
        size = (number - len(items)) // (workers - worker)
        share = longest[worker::workers]
        rest = max(0, size - len(share))
        items += [*share, *others[:rest]]
        del others[:rest]
    items += others


class Forks:
    """Runs `python` and `deepspeed` of shell scripts as forks of a server; see fork_server.py.

    Attributes:
        executable: what programs take for Python.
    """

    def __init__(self, folder: Path):
        self._socket = folder / "socket"
        client = f'"{sys.executable}" -I -S "{Path(__file__).with_name("fork_server.py")}" run "$@"'
        self._client = f"FORK_SERVER='{self._socket}' {client}"
        self.executable = folder / "python"
        self.executable.write_text(f"#!/bin/sh\n{self._client}\n")
        self.executable.chmod(0o755)

    def environment(self, *own: str) -> dict[str, str]:
        """For a shell script; commands that match a shell pattern of `own` are processes of their own all the same."""
        functions = {}
        patterns = [pattern.replace(" ", "\\ ") for pattern in own]
        for name, forked in (("python", self._client), ("deepspeed", 'shift 2; python "$@"')):
            cases = "".join(f'{pattern}) command {name} "$@"; return;; ' for pattern in patterns)
            functions[f"BASH_FUNC_{name}%%"] = f'() {{ case "$*" in {cases} esac; {forked}; }}'
        return functions


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A running fork server."""
    folder = tmp_path_factory.mktemp("forks")
    forks = Forks(folder)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, Path(__file__).with_name("fork_server.py"), "serve", folder / "socket", *PROGRAMS.split()]
    with open(folder / "log", "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        while not (folder / "socket").exists():
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield forks
        server.terminate()


@pytest.fixture(autouse=True)
def interruptible():
    """Let processes started here obey Ctrl-C: those of a shell's background job would inherit that it is ignored.

    What programs in this process do with signals ends with the test.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.fixture(scope="session")
def tiny_rules(tmp_path_factory):
    """A rules file whose sentences have 4 to 8 words."""
    path = tmp_path_factory.mktemp("rules") / "tiny_rules.txt"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="session")
def tiny_data(tiny_rules, tmp_path_factory):
    """A data folder: two training shards of 600 sentences, a test shard of 200, vocab.txt."""
    import generate_pretraining

    folder = tmp_path_factory.mktemp("data")
    sizes = "--sentence-num 600 --shard-num 2 --test-shard-num 1 --test-sentence-num 200 --seed 1".split()
    generate_pretraining.main(["--rule-path", str(tiny_rules), "--save-path", str(folder), *sizes])
    return folder


@pytest.fixture(scope="session")
def tiny_samples(tiny_data, tmp_path_factory):
    """Masked samples of `tiny_data` at 10 tokens, with the tokenizer saved as bert-large-uncased."""
    import generate_samples

    folder = tmp_path_factory.mktemp("samples")
    flags = "--vocab_file vocab.txt --do_lower_case 1 --max_seq_length 10 --max_predictions_per_seq 3 --masked_lm_prob 0.15"
    names = ["--dir", str(tiny_data), "-o", str(folder), "--model_name", "bert-large-uncased"]
    generate_samples.main([*names, *flags.split()])
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A folder of natural text as --source corpus makes it, from the docstrings of Python's own library.

    Two training shards and a test shard of documents, vocab.txt of 600 WordPieces, and the manifest.
    """
    from tokenizers import BertWordPieceTokenizer

    from pcfg.common.files import Manifest
    from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary

    folder = tmp_path_factory.mktemp("documents")
    shards = {"training0.txt": docstrings("argparse", "random"), "training1.txt": docstrings("unittest.case", "shutil")}
    for name, texts in {**shards, "test0.txt": docstrings("statistics")}.items():
        (folder / name).write_text("\n\n".join("\n".join(sentences) for sentences in texts) + "\n")
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train([str(folder / name) for name in shards], vocab_size=600, special_tokens=list(SPECIAL_TOKENS))
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    Vocabulary(words).write(folder / "vocab.txt")
    manifest = Manifest(folder / "manifest_pretraining.json", {"source": "corpus"})
    for path in sorted(folder.glob("*.txt")):
        manifest.add(path.name)
    return folder


def docstrings(*modules: str) -> list[list[str]]:
    """The sentences of each docstring in some modules of Python's library."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    files = [Path(importlib.util.find_spec(module).origin) for module in modules]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds))
    texts = (" ".join((ast.get_docstring(node) or "").split()) for node in nodes)
    return [re.split(r"(?<=[.:]) ", text) for text in texts if text]


@pytest.fixture(scope="session")
def tiny_model(tiny_data, tmp_path_factory):
    """A model folder with a random pre-LN model: hidden 16, 2 layers, 10 positions, the vocabulary of `tiny_data`."""
    from pretraining.data.vocabulary import Vocabulary
    from pretraining.model.bert import MaskedLM
    from pretraining.model.checkpoints import save_model
    from pretraining.model.config import ModelConfig
    from tests.bert_tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = Vocabulary.read(tiny_data / "vocab.txt")
    torch.manual_seed(0)
    model = MaskedLM(ModelConfig(vocabulary.size, 16, 2, 2, 32, max_position_embeddings=10, initializer_range=0.3))
    tokenizer = build_tokenizer(vocabulary, True, 10)
    tokenizer.name_or_path = "bert-large-uncased"
    save_model(folder, model, tokenizer, vocabulary, {"step": 0, "job_name": "tiny"})
    return folder
