"""The real main() of generate_pretraining: files, determinism on all executors, refusals, and kills at any moment."""

import concurrent.futures
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate_pretraining
from pcfg.common.files import InputError, keyed_rng, read_json, sha256
from pcfg.common.text import TEXT_MANIFEST, read_texts, shard_paths
from pcfg.grammar import Grammar
from pcfg.sampler import Sampler

ROOT = Path(__file__).parents[1]
SIZES = {"--sentence-num": 300, "--shard-num": 2, "--test-sentence-num": 50, "--test-shard-num": 1}
SIZES |= {"--seed": 1, "--n_processes": 1}
FLAGS = {"n_processes": "--n_processes"}


def generate(rules, folder, *flags, **sizes):
    """Run main() with the small sizes, some changed: `shard_num=3`."""
    values = SIZES | {FLAGS.get(name, f"--{name.replace('_', '-')}"): value for name, value in sizes.items()}
    arguments = ["--rule-path", rules, "--save-path", folder, *flags]
    generate_pretraining.main([str(part) for part in (*arguments, *(part for pair in values.items() for part in pair))])


def contents(folder):
    """The bytes of all files but the manifest, which lists the files in the order in which they were finished."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != TEXT_MANIFEST}


def test_the_files_of_a_run(tiny_rules, tmp_path, capsys):
    generate(tiny_rules, tmp_path / "data")
    grammar = Grammar.read(tiny_rules)
    names = {"training0.txt", "training1.txt", "test0.txt", "vocab.txt"}
    assert set(contents(tmp_path / "data")) == names
    assert [len(read_texts(path)) for path in shard_paths(tmp_path / "data", "training")] == [300, 300]
    # an empty line between two sentences, none at the end
    lines = (tmp_path / "data" / "test0.txt").read_text().split("\n")
    assert len(lines) == 100 and lines[-1] == "" and lines[1:-1:2] == [""] * 49 and all(lines[:-1:2])
    vocabulary = (tmp_path / "data" / "vocab.txt").read_text().split("\n")
    assert vocabulary == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *grammar.words, ""]
    manifest = read_json(tmp_path / "data" / TEXT_MANIFEST)
    assert manifest["made_from"]["grammar_sha256"] == grammar.sha256 and set(manifest["files"]) == names
    entry = manifest["files"]["training1.txt"]
    text = (tmp_path / "data" / "training1.txt").read_text()
    assert entry["sentences"] == 300 and entry["words"] == len(text.split())
    assert entry["sha256"] == sha256(tmp_path / "data" / "training1.txt")
    output = capsys.readouterr().out
    assert "plan: 2 training shards, 600 sentences" in output and "plan: 1 test shards, 50 sentences" in output
    written = sum(path.stat().st_size for split in ("training", "test") for path in shard_paths(tmp_path / "data", split))
    planned = float(output.split("3 to make, ")[1].split(" GB")[0]) * 1e9
    assert planned == pytest.approx(written, rel=0.03)


def test_shards_differ_and_the_number_of_processes_changes_nothing(tiny_rules, tmp_path):
    generate(tiny_rules, tmp_path / "one")
    generate(tiny_rules, tmp_path / "two", n_processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    generate(tiny_rules, tmp_path / "more", shard_num=3, test_shard_num=0)
    more = contents(tmp_path / "more")
    assert all(contents(tmp_path / "one")[name] == more[name] for name in ("training0.txt", "training1.txt"))
    shards = [content[:1000] for name, content in (more | contents(tmp_path / "one")).items() if name != "vocab.txt"]
    assert len(shards) == 4 and len(set(shards)) == 4
    generate(tiny_rules, tmp_path / "seed", seed=2)
    assert contents(tmp_path / "seed")["training0.txt"] != more["training0.txt"]


def test_text_is_streamed_in_blocks_that_change_nothing(tiny_rules, tmp_path, monkeypatch):
    generate(tiny_rules, tmp_path / "one block")
    sizes = []
    original = Sampler.draw_text

    def draw_text(self, *arguments):
        for text, words in original(self, *arguments):
            sizes.append(len(text))
            yield text, words

    monkeypatch.setattr(Sampler, "draw_text", draw_text)
    monkeypatch.setattr("pcfg.sampler.TEXT_BUFFER", 1000)
    generate(tiny_rules, tmp_path / "blocks")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "one block")
    assert len(sizes) > 20 and max(sizes) < 1100
    files = (read_json(tmp_path / name / TEXT_MANIFEST)["files"] for name in ("blocks", "one block"))
    assert next(files) == next(files)


def test_a_rerun_skips_what_is_complete_and_mends_what_is_not(tiny_rules, tmp_path, capsys):
    generate(tiny_rules, tmp_path)
    before, times = contents(tmp_path), {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    generate(tiny_rules, tmp_path)
    assert "0 shards made, 3 skipped" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    damaged = bytearray(before["training1.txt"])
    damaged[100] ^= 1
    (tmp_path / "training1.txt").write_bytes(damaged)
    (tmp_path / "test0.txt").unlink()
    generate(tiny_rules, tmp_path)
    assert "2 shards made, 1 skipped" in capsys.readouterr().out
    assert contents(tmp_path) == before
    generate(tiny_rules, tmp_path, shard_num=3)
    assert "1 shards made, 3 skipped" in capsys.readouterr().out
    assert before.items() < contents(tmp_path).items()


def test_text_made_otherwise_is_refused_or_replaced(tiny_rules, tmp_path):
    generate(tiny_rules, tmp_path / "data", shard_num=3)
    with pytest.raises(InputError, match="seed was 1, now 2.*--overwrite"):
        generate(tiny_rules, tmp_path / "data", seed=2)
    generate(tiny_rules, tmp_path / "data", "--overwrite", seed=2, shard_num=1)
    generate(tiny_rules, tmp_path / "fresh", seed=2, shard_num=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_files_of_others_are_not_replaced(tiny_rules, tmp_path):
    (tmp_path / "training7.txt").write_text("my own text\n")
    with pytest.raises(InputError, match=r"training7.txt: text that this script has no record of"):
        generate(tiny_rules, tmp_path)
    (tmp_path / "training7.txt").rename(tmp_path / "other.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(InputError, match=r"vocab.txt: another vocabulary is here"):
        generate(tiny_rules, tmp_path)
    assert (tmp_path / "vocab.txt").read_text() == "[PAD]\n" and not shard_paths(tmp_path, "training")
    generate(tiny_rules, tmp_path, "--overwrite")
    assert (tmp_path / "other.txt").read_text() == "my own text\n"


def test_the_length_limit_keeps_shorter_sentences(tiny_rules, tmp_path, capsys):
    generate(tiny_rules, tmp_path, length_limit=7)
    assert {len(text.split()) for text in read_texts(tmp_path / "training0.txt")} == {4, 5, 6}
    assert "sentences of at most 6 words" in capsys.readouterr().out
    with pytest.raises(InputError, match="--length-limit 1"):
        generate(tiny_rules, tmp_path, length_limit=1)
    with pytest.raises(InputError, match="0 of the grammar's sentences have 1 to 3 words"):
        generate(tiny_rules, tmp_path / "short", length_limit=4)
    assert not (tmp_path / "short").exists()


def test_a_disk_that_is_too_small_is_refused(tiny_rules, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10**4, 10**4))
    with pytest.raises(InputError, match=r"GB to write, but the disk has 1e-05 GB free"):
        generate(tiny_rules, tmp_path / "deep" / "data")
    assert not (tmp_path / "deep").exists()


def test_nothing_to_make_and_numbers_out_of_range_are_refused(tiny_rules, tmp_path, capsys):
    with pytest.raises(InputError, match="nothing to make"):
        generate(tiny_rules, tmp_path, shard_num=0, test_shard_num=0)
    for flag, value in (("sentence_num", 0), ("seed", -1), ("n_processes", "x")):
        with pytest.raises(SystemExit) as stopped:
            generate(tiny_rules, tmp_path, **{flag: value})
        assert stopped.value.code == 2
        assert f"argument {FLAGS.get(flag, '--' + flag.replace('_', '-'))}: " in capsys.readouterr().err


def test_a_vocabulary_is_copied_after_a_check(tiny_rules, tmp_path):
    grammar = Grammar.read(tiny_rules)
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "zebra", *reversed(grammar.words), "##s"]
    (tmp_path / "bert_vocab.txt").write_text("\n".join(words))
    generate(tiny_rules, tmp_path / "data", "--vocab-file", tmp_path / "bert_vocab.txt")
    assert (tmp_path / "data" / "vocab.txt").read_bytes() == (tmp_path / "bert_vocab.txt").read_bytes()
    assert read_texts(tmp_path / "data" / "training0.txt")
    wrong = {
        "'river' is not in this vocabulary": [word for word in words if word != "river"],
        r"special token \[MASK\] is missing": [word for word in words if word != "[MASK]"],
        "bad.txt:9: entry '' is empty": [*words[:8], "", *words[8:]],
        "bad.txt:1: starts with a byte order mark": ["\ufeff[PAD]", *words[1:]],
    }
    for message, entries in wrong.items():
        (tmp_path / "bad.txt").write_text("\n".join(entries))
        with pytest.raises(InputError, match=message):
            generate(tiny_rules, tmp_path / "bad", "--vocab-file", tmp_path / "bad.txt")
    with pytest.raises(InputError, match="absent.txt: no such file"):
        generate(tiny_rules, tmp_path / "bad", "--vocab-file", tmp_path / "absent.txt")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("flag", ["--shard-num", "--test-shard-num"])
def test_a_hundred_million_shards_are_refused_before_they_are_listed(tiny_rules, tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        generate(tiny_rules, tmp_path / "data", flag, 100_000_000)
    assert "100000000 is not in 0 to 100,000; make larger shards" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_an_empty_folder_name_is_refused(tiny_rules, capsys):
    with pytest.raises(SystemExit):
        generate(tiny_rules, "")
    assert "argument --save-path: an empty name" in capsys.readouterr().err


def test_special_tokens_are_no_words(tmp_path):
    (tmp_path / "rules.txt").write_text("S a 0.5\nS [MASK] 0.5\n")
    with pytest.raises(InputError, match=r"\[MASK\]: a special token as a word"):
        generate(tmp_path / "rules.txt", tmp_path / "data")


def test_words_that_the_tokenizer_splits_are_found_before_the_text(tmp_path, capsys):
    rules = "S W W 1.0\nW U.S. 0.25\nW 's 0.25\nW John 0.25\nW cat 0.25\n"
    (tmp_path / "rules.txt").write_text(rules)
    with pytest.raises(InputError, match=r"words \"'s\", 'U.S.' are not one token each.*; replace them"):
        generate(tmp_path / "rules.txt", tmp_path / "data")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n##ing\nJohn\n")
    (tmp_path / "pieces.txt").write_text("S cat 0.25\nS ##ing 0.75\n")
    with pytest.raises(InputError, match="words '##ing' are not one token each"):
        generate(tmp_path / "pieces.txt", tmp_path / "data", "--vocab-file", tmp_path / "vocab.txt")
    assert not (tmp_path / "data").exists()
    (tmp_path / "rules.txt").write_text(rules.replace("U.S.", "us").replace("'s", "possessive"))
    generate(tmp_path / "rules.txt", tmp_path / "data")
    assert "words with capitals or accents: 'John'; generate_samples.py needs --do_lower_case 0" in capsys.readouterr().out


def test_shipped_grammars_are_found_and_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generate("rule_mini_mlm.txt", "data")
    assert "rule_mini_mlm.txt: shipped grammar, not the paper's; entropy " in capsys.readouterr().out
    with pytest.raises(InputError, match="shipped are: rule_deep_mlm.txt, .*rule_mini_mlm.txt"):
        generate("rule_absent.txt", "data")


def run_script(*arguments):
    """Start the script as users do."""
    command = [sys.executable, str(ROOT / "generate_pretraining.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_errors_of_users_end_without_a_traceback(tmp_path):
    (tmp_path / "rules.txt").write_text("S a 0.5\nS b x\n")
    process = run_script("--rule-path", tmp_path / "rules.txt", "--save-path", tmp_path / "data")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "rules.txt:2: probability 'x' is not a number" in errors
    assert "Traceback" not in errors


MANY = "--sentence-num 100000 --shard-num 6 --test-shard-num 1 --test-sentence-num 100 --n_processes 2".split()


@pytest.fixture(scope="module")
def undisturbed(tiny_rules, tmp_path_factory):
    """The folder of a run with the flags `MANY` on one thread, that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    generate_pretraining.main(["--rule-path", str(tiny_rules), "--save-path", str(folder), *MANY, "--n_processes", "1"])
    return folder


def assert_as_undisturbed(folder, undisturbed):
    """The same files with the same bytes, the same entries in the manifest, and nothing else."""
    assert contents(folder) == contents(undisturbed)
    files = (read_json(place / TEXT_MANIFEST)["files"] for place in (folder, undisturbed))
    assert next(files) == next(files)


def test_all_executors_of_this_machine_give_the_same_bytes(tiny_rules, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    arguments = ["--rule-path", str(tiny_rules), *MANY, "--save-path"]
    generate_pretraining.main([*arguments, str(tmp_path / "threads")])
    assert_as_undisturbed(tmp_path / "threads", undisturbed)
    # the script's local workers are threads; as any function of a job, its own can run on processes as well
    on_processes = {"n_processes": 2, "executor": "processes", "ray_address": None}
    monkeypatch.setattr("pretraining.sources.grammar.executor_options", lambda *_, **__: on_processes)
    generate_pretraining.main([*arguments, str(tmp_path / "processes")])
    assert_as_undisturbed(tmp_path / "processes", undisturbed)


def writer_of(folder):
    """A process that has a temporary file of `folder` open, by /proc; None if there is none."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue  # it has ended, or closed the file, or is not ours to see
        if target.startswith(f"{folder}/.training"):
            return int(descriptor.parts[2])
    return None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see which process writes")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (tests/requirements.txt)")
def test_ray_gives_the_same_bytes_though_a_worker_is_killed_in_the_middle_of_a_shard(tiny_rules, tmp_path, undisturbed):
    folder = tmp_path / "ray"
    process = run_script("--rule-path", tiny_rules, "--save-path", folder, *MANY, "--executor", "ray")
    deadline = time.monotonic() + 120
    while (worker := writer_of(folder)) is None:
        assert process.poll() is None and time.monotonic() < deadline, "no worker was seen at work"
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "6 shards made" in output or "7 shards made" in output
    assert_as_undisturbed(folder, undisturbed)


def rerun_after_kill(tiny_rules, folder, undisturbed):
    """Run the same command again in this process, and compare."""
    generate_pretraining.main(["--rule-path", str(tiny_rules), "--save-path", str(folder), *MANY])
    assert_as_undisturbed(folder, undisturbed)


def test_a_kill_in_the_middle_of_a_shard_and_a_rerun_give_the_undisturbed_files(tiny_rules, tmp_path, undisturbed):
    folder = tmp_path / "killed"
    process = run_script("--rule-path", tiny_rules, "--save-path", folder, *MANY)
    # Kill in the middle: one shard is finished, another is being written.
    deadline = time.monotonic() + 120
    while not (list(folder.glob("training*.txt")) and list(folder.glob(".training*.tmp"))):
        assert process.poll() is None and time.monotonic() < deadline, "never seen in the middle"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob(".training*.tmp")) and len(list(folder.glob("training*.txt"))) < 6
    rerun_after_kill(tiny_rules, folder, undisturbed)


def kill_after(tiny_rules, folder, seconds, from_first_file):
    """Start the script and kill it `seconds` after its start, or after the appearance of its folder."""
    process = run_script("--rule-path", tiny_rules, "--save-path", folder, *MANY)
    while from_first_file and not folder.exists() and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kills_at_many_moments_of_a_run_and_reruns_give_the_undisturbed_files(tiny_rules, tmp_path, undisturbed):
    """Moments from the start of the process on, and more of them from the appearance of its first file to its end."""
    timed, started = run_script("--rule-path", tiny_rules, "--save-path", tmp_path / "timed", *MANY), time.monotonic()
    while not (tmp_path / "timed").exists():
        assert timed.poll() is None
        time.sleep(0.0005)
    start_up = time.monotonic() - started
    timed.communicate()
    writing = time.monotonic() - started - start_up
    early, late = (6, 14) if os.environ.get("LONG_TESTS") else (3, 7)
    parts = keyed_rng(0, "moments of kills").random(early + late)
    moments = [(part * start_up, False) for part in parts[:early]] + [(part * writing, True) for part in parts[early:]]
    folders = [tmp_path / f"killed{number}" for number in range(early + late)]
    # Two at a time, so that the start of one overlaps with that of another.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda folder, moment: kill_after(tiny_rules, folder, *moment), folders, moments))
    finished = [len(list(folder.glob("training*.txt"))) for folder in folders if folder.exists()]
    assert any(number < 6 for number in finished), "no kill met a run in the middle"
    for folder in folders:
        rerun_after_kill(tiny_rules, folder, undisturbed)


def test_the_script_starts_without_heavy_packages():
    code = "import sys, generate_pretraining; print({'torch', 'transformers', 'nltk', 'h5py', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
