"""The four READMEs are true and readable: file trees, commands, flags, links, snippets, and the length of sentences."""

import importlib
import importlib.util
import itertools
import pkgutil
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from pretraining.experiments import __main__ as experiments

ROOT = Path(__file__).parents[1]
FRONT, *REFERENCES = PAGES = ("README.md", "pcfg/README.md", "pretraining/README.md", "scripts/README.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
MOST_LINES, MOST_WORDS = 250, 35
# Lines of the reading path: balanced trace, ridge, studies and verdicts are part of the science.
MOST_READING = 4830
# The sections of the users' own README, whose links must keep working.
USER_SECTIONS = """Installation|Dataset Generation|Pre-training Data|Downstream Data|Pre-training|Evaluation|Pre-training Loss
Trace of Hessian|View a Small Transformer as a Large One|Fine-tuning|Linear Probe"""
DIALECT = re.compile(
    r"\b(seconds|sentences|words|masks|files?|lines?|rows?|samples|steps?|tokens|labels|models|bytes|passes|positions|operations|"
    r"numbers|rules|ranks) an? (shard|second|sentence|script|file|line|task|step|batch|position|seed|row|model|level|word|"
    r"group|panel|cell|layer|head|column|run|node|symbol|document)\b"
    r"|\b(beside|hangs? on|as dear|told apart|when you like|goes on)\b"
)
PLACEHOLDERS = {"K": "2", "L": "0.3", "N": "3", "%a": "3"}
# Flags in the text that no parser of ours has: of pip, SLURM, DeepSpeed, torchrun, ray, prepare_*.sh and benchmark.sh.
OTHER_FLAGS = {"--no-build-isolation", "--nodes", "--master_port", "--num_gpus", "--hostfile", "--small"}
OTHER_FLAGS |= {"--partition", "--account", "--time", "--array", "--gpus-per-node", "--ntasks-per-node", "--cpus-per-task"}
OTHER_FLAGS |= {"--signal", "--shutdown-timeout", "--head", "--port", "--address"}
OTHER_FLAGS |= {"--only", "--scale", "--output", "--memory", "--folder"}
SOURCES = ("pcfg", "opt", "corpus")
SPELLED = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def tracked(folder: str = ".") -> set[str]:
    """The files of the repository below `folder`, relative to it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT / folder, capture_output=True, text=True, check=True).stdout.split()
    return {path for path in listed if (ROOT / folder / path).exists()}


def tree(page: str) -> set[str]:
    """The paths of a page's file tree; folders end with a slash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", TEXT[page], re.S | re.M)
    block = next(block for block in blocks if re.match(r"\S+(\.py|\.sh|/)\s", block))
    paths, folders = set(), []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 4]
        paths.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_front_page_has_the_upper_two_levels():
    paths = {path for path in tracked() if not path.startswith(".")} - {FRONT}
    top = {path.split("/")[0] + "/" * ("/" in path) for path in paths}
    below = {"/".join(path.split("/")[:2]) + "/" for path in paths if path.count("/") > 1 and not path.startswith("tests/")}
    assert tree(FRONT) == top | below | {"tests/benchmarks/"}


@pytest.mark.parametrize("page", REFERENCES)
def test_each_reference_lists_every_module_of_its_folder(page):
    files = {path for path in tracked(str(Path(page).parent)) if not path.endswith(("README.md", "__init__.py"))}
    assert {path for path in tree(page) if not path.endswith("/")} == files


def blocks(text: str) -> list[str]:
    """The indented code blocks of a page."""
    return re.findall(r"(?:(?<=\n\n)|\A)(?:    .*\n)+", re.sub(r"```.*?```\n", "", text, flags=re.S))


def without_code(text: str) -> str:
    """The prose of a page: no code blocks, tables, headings, pictures and comments."""
    text = re.sub(r"```.*?```\n", "", text, flags=re.S)
    for block in blocks(text):
        text = text.replace("\n" + block, "\n")
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "<", "!")))


def commands(page: str) -> list[tuple[str, ...]]:
    """The commands of a page's code blocks as words, without variables of the environment before them."""
    lines = "".join(re.sub(r"\\\n\s*", " ", block) for block in blocks(TEXT[page])).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    stripped = [tuple(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words)) for words in split]
    return [words for words in stripped if words and words[0] in ("python", "deepspeed", "bash", "sbatch")]


COMMANDS = [words for page in PAGES for words in commands(page)]


def module_of(name: str):
    """A module that is a program, or the __main__.py of a package."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def program(words: tuple[str, ...]) -> tuple:
    """The module of ours that a command starts (None: a script without flags) and the arguments that it gets."""
    if words[0] == "deepspeed":
        words = ("python", *script_of_deepspeed(words[1:]))
    if words[0] == "sbatch":
        words = tuple(itertools.dropwhile(lambda word: not word.endswith(".sbatch"), words))
    if words[:2] == ("python", "-m"):
        return module_of(words[2]), words[3:]
    path, arguments = words[words[0] in ("python", "bash") :][0], words[words[0] in ("python", "bash") :][1:]
    assert path in tracked(), path
    name = Path(path).name
    if name.endswith(".py"):
        return importlib.import_module(name.removesuffix(".py")), arguments
    if name == "benchmark.sh":
        assert f"tests/benchmarks/benchmark_{arguments[0]}.py" in tracked()
        return (importlib.import_module(f"benchmark_{arguments[0]}") if arguments[1:] else None), arguments[1:]
    if name.startswith("reproduce_"):
        return experiments, ("scripts/studies/steps.toml", *([] if "--out" in arguments else ["--out", "OUT"]), *arguments)
    if name.startswith("pretrain"):
        names = zip(("--dataset_path", "--output_dir", "--job_name"), arguments[:3], strict=True)
        given = (*itertools.chain(*names), "--tokenizer_name", "T", *arguments[3:]) if name == "pretrain.sh" else arguments
        return importlib.import_module("run_pretraining"), given
    flags = [word for word in arguments if word.startswith("--")]
    assert flags == ["--small"] * (name.startswith("prepare_") and len(flags)), f"{name} takes no {flags}"
    return None, ()


def script_of_deepspeed(words: tuple[str, ...]) -> list[str]:
    """The script that DeepSpeed's launcher is to start, and the script's arguments."""
    options = parse_deepspeed(list(words))
    return [options.user_script, *options.user_args]


def parser_of(module, source: str | None = None):
    return module.build_parser(source) if source else module.build_parser()


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_the_commands_parse(words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    module, arguments = program(words)
    arguments = [PLACEHOLDERS.get(word, word) for word in arguments]
    source = next((after for word, after in itertools.pairwise(arguments) if word == "--source"), None)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            parser_of(module, source).parse_args(arguments)
        assert "usage:" in capsys.readouterr().out
    elif module is not None:
        assert vars(parser_of(module, source).parse_args(arguments))


def test_there_is_a_command_for_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {word for words in commands(FRONT) for word in words if word.endswith(".py")}


def test_the_dataset_commands_run(tmp_path, monkeypatch, capsys):
    """As they are written, but for the number of sentences of pre-training and of the hidden Markov model."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "generate_pretraining": "--sentence-num 500 --shard-num 2 --test-shard-num 1 --test-sentence-num 50",
        "generate_downstream": "",
        "generate_samples": "",
        "pcfg.lookup": "",
        "pcfg.hmm": "--states 10",
        "pcfg.random_grammar": "--fact-sentences 100",
    }
    for words in [*commands(FRONT), *commands("pcfg/README.md")]:
        module, arguments = program(words)
        name = module.__name__ if module else ""
        if name in sizes:
            module.main([*arguments, *sizes[name].split()])
    assert "rule_deep_mlm.txt: shipped grammar, not the paper's; entropy 4.517" in capsys.readouterr().out
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    shards = {f"pcfg_dataset/pretraining/train_shard_{k}.hdf5" for k in range(10)}
    assert shards | {"pcfg_dataset/vocab.txt", "pcfg_dataset/pcfg_B.csv", "pcfg_dataset/lookup.hdf5"} <= files
    assert {"my_rules.txt", "rule_hmm.txt", "hmm_dataset/pcfg_state6.csv"} <= files


@pytest.mark.parametrize("page", PAGES)
def test_the_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", TEXT[page], re.S)
    assert (page == "pcfg/README.md") == bool(snippets)
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


def studies(page: str) -> list[str]:
    """The study files, and parts of study files, of a page."""
    return re.findall(r"^```toml\n(.*?)^```", TEXT[page], re.S | re.M)


def test_the_study_of_the_front_page_can_be_planned(tmp_path, capsys):
    [study] = studies(FRONT)
    assert study.count("\n") <= 25
    rules = ROOT / "pcfg/rules/rule_mini_headroom.txt"
    (tmp_path / "my_rules.txt").write_text(rules.read_text())
    (tmp_path / "dropout.toml").write_text(study.replace('"scripts/', f'"{ROOT}/scripts/'))
    experiments.main([str(tmp_path / "dropout.toml"), "--out", str(tmp_path / "out"), "--dry-run"])
    assert "primary: dropout-0 at step 8000 against dropout-0.1 at step 8000" in capsys.readouterr().out


def test_parts_of_study_files_are_toml():
    parts = [part for page in REFERENCES for part in studies(page)]
    assert parts and all(map(tomllib.loads, parts))


def flags(parser) -> set[str]:
    """The long flags of a parser, both spellings as one."""
    return {flag.replace("-", "_") for flag in parser._option_string_actions if flag.startswith("--")}


@pytest.fixture(scope="module")
def programs() -> dict[str, set[str]]:
    """The flags of every program of ours that has a parser, by the name that the pages use."""
    names = [path.removesuffix(".py") for path in tracked() if path.endswith(".py") and not path.startswith("tests/")]
    with_parser = [name for name in names if "def build_parser()" in (ROOT / f"{name}.py").read_text()]
    modules = {name.replace("/", "."): importlib.import_module(name.replace("/", ".")) for name in with_parser}
    known = {name.removesuffix(".__main__"): flags(module.build_parser()) for name, module in modules.items()}
    generate = importlib.import_module("generate_pretraining")
    known["generate_pretraining"] = set.union(*(flags(generate.build_parser(source)) for source in SOURCES))
    return known


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_in_the_text_exist(page, programs):
    known = set.union(*programs.values()) | {flag.replace("-", "_") for flag in OTHER_FLAGS}
    text = re.sub(r"```.*?```\n", "", TEXT[page], flags=re.S)
    assert {flag for flag in SPELLED.findall(text) if flag.replace("-", "_") not in known} == set()


@pytest.mark.parametrize("page", PAGES)
def test_commands_inside_the_text_name_programs_and_their_flags(page, programs):
    for code in re.findall(r"`([^`\n]+)`", without_code(TEXT[page]).replace("\n", " ")):
        code = re.sub(r"^([A-Z_]+=\S+ )+", "", code)
        path = re.match(r"(?:python |bash |sbatch )?(?:scripts/)?([\w.]+\.(?:py|sh|sbatch))\b", code)
        module = re.match(r"python -m ([\w.]+)", code)
        if path and " " in code:
            name = path[1]
            assert name in tracked() or f"scripts/{name}" in tracked() or any(p.endswith("/" + name) for p in tracked()), code
        if module:
            assert importlib.util.find_spec(module[1]), code
        name = module[1] if module else path[1].removesuffix(".py") if path else None
        if name in programs:
            assert {flag.replace("-", "_") for flag in SPELLED.findall(code)} <= programs[name], code


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_exist(page):
    text = re.sub(r"^\| `[^`]*` \|", "|", TEXT[page], flags=re.M)  # the old names in the table of moves
    names = re.findall(r"`((?:pcfg|pretraining)(?:\.\w+)+)`", text)
    assert [name for name in names if not name.endswith((".py", ".sh")) and not resolves(name)] == []


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT[page])
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().relative_to(ROOT).as_posix() in tracked(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_references_are_linked():
    assert all(f"({page}" in TEXT[FRONT] for page in REFERENCES)


def sentences(page: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", without_code(TEXT[page]))
    parts = [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])[)*]*\s+", " ".join(paragraph.split()))]
    return [part for part in parts if part]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    words = {sentence: len(sentence.split()) for sentence in sentences(page)}
    assert len(words) > 20
    assert [sentence for sentence, number in words.items() if number > MOST_WORDS] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_language_is_plain(page):
    assert [match[0] for match in DIALECT.finditer(" ".join(TEXT[page].split()))] == []


def test_the_front_page_is_short_and_has_the_users_sections():
    assert TEXT[FRONT].count("\n") <= MOST_LINES
    headings = re.findall(r"^#+ (.*)$", TEXT[FRONT], re.M)
    sections = re.split(r"[|\n]", USER_SECTIONS)
    assert [heading for heading in headings if heading in sections] == sections


def test_the_reading_path():
    """Each file exists, and the number of lines is the one that the page promises."""
    section = TEXT[FRONT].split("## Reading path")[1].split("\n## ")[0]
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    assert "the nine scripts" in section and len(scripts) == 9
    files = [*re.findall(r"\]\(([\w/]+\.py)\)", section), *scripts]
    assert len(files) == 22
    lines = sum((ROOT / name).read_text().count("\n") for name in files)
    promised = int(re.search(r"about ([\d,]+) lines", section)[1].replace(",", ""))
    assert lines <= MOST_READING and abs(lines - promised) <= 250, lines


def test_the_loss_and_the_trace_have_their_own_commands():
    trace = TEXT[FRONT].split("### Trace of Hessian")[1].split("###")[0]
    assert "python calculate_hessian.py" in trace and "calculate_loss" not in trace
