"""generate_samples.py: the real main() on tiny text, reruns, kills and every refusal."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import generate_samples
from pcfg.common.files import InputError, Manifest, read_json, sha256
from pretraining.data.samples import read_samples, sample_paths
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary, resolve_tokenizer

SCRIPT = Path(generate_samples.__file__)
WORDS = ["a", "the", "cat", "dog", "runs", "sleeps", "big", "small"]


def write_text(path, number, seed):
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(number)]
    path.write_text("\n\n".join(lines) + "\n")
    return lines


@pytest.fixture
def text(tmp_path):
    """A folder with two training shards, one test shard and a vocabulary."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index, name in enumerate(("training0.txt", "training1.txt", "test0.txt")):
        write_text(folder / name, 40, index)
    Vocabulary([*SPECIAL_TOKENS, *WORDS]).write(folder / "vocab.txt")
    return folder


def run(text, output, *more):
    generate_samples.main(["--dir", str(text), "-o", str(output), "--n_processes", "1", *map(str, more)])


def digests(folder):
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def list_in_manifest(text):
    """What generate_pretraining.py leaves beside the text."""
    manifest = Manifest(text / "manifest_pretraining.json", {"grammar": "test"})
    for path in sorted(text.glob("*.txt")):
        manifest.add(path.name)


def test_the_command_of_the_readme(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text.rename("pcfg_dataset")
    generate_samples.main(
        "--dir pcfg_dataset -o pcfg_dataset/pretraining --dup_factor 5 --vocab_file vocab.txt --do_lower_case 1 "
        "--masked_lm_prob 0.15 --max_seq_length 32 --model_name bert-large-uncased --max_predictions_per_seq 5 "
        "--n_processes 32".split()
    )
    output = Path("pcfg_dataset/pretraining")
    assert [path.name for path in sample_paths(output, "train")] == [f"train_shard_{k}.hdf5" for k in range(10)]
    assert [path.name for path in sample_paths(output, "test")] == [f"test_shard_{k}.hdf5" for k in range(5)]
    assert "vocabulary: pcfg_dataset/vocab.txt, 13 entries" in capsys.readouterr().out

    tokenizer = resolve_tokenizer("bert-large-uncased", [output])
    vocabulary = Vocabulary.read(output / "bert-large-uncased" / "vocab.txt")
    lines = [line for line in Path("pcfg_dataset/training1.txt").read_text().splitlines() if line]
    samples = read_samples(output / "train_shard_7.hdf5")  # the third of text shard 1
    assert samples.input_ids.shape == (40, 32) and samples.masked_lm_ids.shape == (40, 5)
    assert samples.attributes["source"] == "training1.txt"
    assert samples.attributes["source_sha256"] == sha256("pcfg_dataset/training1.txt")
    assert samples.attributes["vocab_sha256"] == vocabulary.sha256
    restored = samples.input_ids.copy()
    row, column = np.nonzero(samples.masked_lm_positions)
    restored[row, samples.masked_lm_positions[row, column]] = samples.masked_lm_ids[row, column]
    for line, ids in zip(lines, restored, strict=True):
        expected = tokenizer(line)["input_ids"]
        assert ids.tolist() == expected + [0] * (32 - len(expected))


def test_shards_of_the_same_text_have_different_masks(text, tmp_path):
    run(text, tmp_path / "out", "--dup_factor", 3)
    masks = [read_samples(path).masked_lm_positions for path in sample_paths(tmp_path / "out", "train")]
    masks += [read_samples(path).masked_lm_positions for path in sample_paths(tmp_path / "out", "test")]
    for index, first in enumerate(masks):
        assert all(not np.array_equal(first, second) for second in masks[index + 1 :])


def test_train_and_test_have_streams_of_their_own(text, tmp_path):
    shutil.copy(text / "training0.txt", text / "test0.txt")
    run(text, tmp_path / "out")
    train, test = (read_samples(sample_paths(tmp_path / "out", split)[0]) for split in ("train", "test"))
    assert not np.array_equal(train.masked_lm_positions, test.masked_lm_positions)


def test_single_mask(text, tmp_path):
    run(text, tmp_path / "out", "--single_mask")
    samples = read_samples(tmp_path / "out" / "train_shard_0.hdf5")
    assert samples.masked_lm_positions.shape == (40, 1)
    assert ((samples.input_ids == 4).sum(axis=1) == 1).all()
    assert samples.attributes["single_mask"] is True


def test_the_number_of_processes_changes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    run(text, tmp_path / "one", "--dup_factor", 2)
    run(text, tmp_path / "two", "--dup_factor", 2, "--n_processes", 2)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    for found in (one, two):
        found.pop("manifest_samples.json")  # lists the files in the order in which they were finished
    assert one == two


def test_a_shard_depends_on_nothing_but_its_text_and_number(text, tmp_path):
    """Made alone or beside others, today or from a folder of another name: the same bytes."""
    run(text, tmp_path / "all")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("training1.txt", "vocab.txt"):
        shutil.copy(text / name, alone / name)
    run(alone, tmp_path / "one")
    assert sha256(tmp_path / "one" / "train_shard_1.hdf5") == sha256(tmp_path / "all" / "train_shard_1.hdf5")


def test_the_seed_changes_the_masks(text, tmp_path):
    run(text, tmp_path / "a")
    run(text, tmp_path / "b", "--seed", 1)
    assert sha256(tmp_path / "a" / "train_shard_0.hdf5") != sha256(tmp_path / "b" / "train_shard_0.hdf5")


def test_a_rerun_skips_what_is_complete_and_repairs_the_rest(text, tmp_path, capsys):
    output = tmp_path / "out"
    run(text, output)
    before = digests(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(text, output)
    assert "3 skipped (complete), 0 to make" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    damaged = output / "train_shard_1.hdf5"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (output / "test_shard_0.hdf5").unlink()
    (output / "bert-large-uncased" / "tokenizer.json").write_text("{}")
    run(text, output)
    assert "1 skipped (complete), 2 to make" in capsys.readouterr().out
    assert digests(output) == before


def test_more_text_extends_the_samples(text, tmp_path, capsys):
    run(text, tmp_path / "out")
    write_text(text / "training2.txt", 10, 9)
    capsys.readouterr()
    run(text, tmp_path / "out")
    assert "3 skipped (complete), 1 to make" in capsys.readouterr().out
    assert len(read_samples(tmp_path / "out" / "train_shard_2.hdf5")) == 10


KILLING = """
import os, shutil, signal, sys, time
import numpy as np
import generate_samples

folder, *command = sys.argv[1:]
for output in ("first", "undisturbed"):  # kernels and modules are loaded the first time
    begin = time.monotonic()
    generate_samples.main([*command, "-o", f"{folder}/{output}"])
    duration = time.monotonic() - begin
rng, killed = np.random.default_rng(0), 0
while killed < 20:
    child = os.fork()
    if child == 0:
        generate_samples.main([*command, "-o", f"{folder}/killed{killed}"])
        os._exit(0)
    time.sleep(rng.random() * duration)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        killed += 1
    else:  # it was done already
        duration *= 0.95
        shutil.rmtree(f"{folder}/killed{killed}")
"""


def test_killed_at_twenty_moments_and_run_again(text, tmp_path):
    """SIGKILL at random moments of the work; the same command again gives what an undisturbed run gives.

    The processes are forked from one that has imported everything: half a second of imports, in which nothing is written,
    would otherwise take most of the kills, and of the test's time.
    """
    for index in range(2):
        write_text(text / f"training{index}.txt", 3000, index)
    command = ["--dir", str(text), "--dup_factor", "3", "--n_processes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(SCRIPT.parent)}
    subprocess.run([sys.executable, "-c", KILLING, tmp_path, *command], env=environment, check=True, capture_output=True)
    expected = digests(tmp_path / "undisturbed")
    for number in range(20):
        output = tmp_path / f"killed{number}"
        for path in sample_paths(output, "train"):
            read_samples(path)  # whatever has its name is complete
        generate_samples.main([*command, "-o", str(output)])
        assert digests(output) == expected
        assert {path.name for path in output.rglob("*") if path.is_dir()} == {"bert-large-uncased"}


def test_other_arguments_are_refused_and_overwrite_replaces(text, tmp_path, capsys):
    output = tmp_path / "out"
    run(text, output, "--dup_factor", 3)
    before = digests(output)
    with pytest.raises(InputError, match="dup_factor was 3, now 2.*--overwrite"):
        run(text, output, "--dup_factor", 2)
    assert digests(output) == before
    run(text, output, "--dup_factor", 2, "--overwrite")
    run(text, tmp_path / "fresh", "--dup_factor", 2)
    assert digests(output) == digests(tmp_path / "fresh")  # the third shards of before are gone
    assert "train_shard_4.hdf5: removed" in capsys.readouterr().out


def test_files_of_another_set_are_refused(text, tmp_path):
    run(text, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "train_shard_0.hdf5", tmp_path / "out" / "train_shard_77.hdf5")
    with pytest.raises(InputError, match="train_shard_77.hdf5: a sample file of another set"):
        run(text, tmp_path / "out")


def test_changed_text_is_refused_and_overwrite_replaces(text, tmp_path):
    run(text, tmp_path / "out")
    write_text(text / "training1.txt", 41, 7)
    with pytest.raises(InputError, match="train_shard_1.hdf5: was made from another training1.txt"):
        run(text, tmp_path / "out")
    run(text, tmp_path / "out", "--overwrite")
    assert len(read_samples(tmp_path / "out" / "train_shard_1.hdf5")) == 41


def test_text_that_is_not_the_manifests_is_refused(text, tmp_path, capsys):
    run(text, tmp_path / "without")
    assert "manifest_pretraining.json: not there" in capsys.readouterr().out
    list_in_manifest(text)
    run(text, tmp_path / "out")
    assert "not there" not in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(tmp_path / "without")

    original = (text / "training1.txt").read_text()
    (text / "training1.txt").write_text(original.replace("cat", "dog", 1))
    with pytest.raises(InputError, match="training1.txt: damaged, its SHA-256 is not the one in .*manifest_pretraining.json"):
        run(text, tmp_path / "out")
    (text / "training1.txt").write_text(original)
    write_text(text / "training2.txt", 5, 0)
    with pytest.raises(InputError, match="training2.txt: is not among the files of"):
        run(text, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("cat\n\nthe bird runs\n", [], "training0.txt: sentence 2: word 'bird' is not in the vocabulary"),
        ("cat\n\nThe cat\n", [], "sentence 2: word 'The' .* write the text in lower case"),
        ("cat\n\na " + "big " * 30 + "dog\n", [], "training0.txt: sentence 2 has 32 words.*--max_seq_length 34 or more"),
        ("cat\n\na cat runs\n", ["--max_seq_length", 4], "sentence 2 has 3 words.*--max_seq_length 5 or more, not 4"),
        ("", [], "training0.txt: no sentences"),
        ("cat\n", ["--mask_token_prob", 0.8, "--random_token_prob", 0.3], "their sum 1.1"),
        ("cat\n", ["--model_name", "../up"], "--model_name: '../up'"),
        ("cat\n", ["--model_name", "/tmp/up"], "--model_name: '/tmp/up'"),
        ("cat\n", ["--vocab_file", "none.txt"], "vocabulary none.txt: no such file; looked for .*none.txt, none.txt"),
    ],
)
def test_errors(text, tmp_path, content, more, message):
    (text / "training0.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        run(text, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_advice_of_a_refused_run_can_be_followed(text, tmp_path):
    for path in text.glob("t*[0-9].txt"):
        path.write_text("cat\n\na cat runs\n")
    with pytest.raises(InputError, match="--max_seq_length 5 or more, not 4"):
        run(text, tmp_path / "out", "--max_seq_length", 4)
    run(text, tmp_path / "out", "--max_seq_length", 5)
    assert len(read_samples(tmp_path / "out" / "train_shard_1.hdf5")) == 2


@pytest.mark.parametrize(("word", "lower"), [("Cat", 1), ("o'clock", 0), ("caf\u00e9", 1)])
def test_words_that_the_tokenizer_changes_are_named(text, tmp_path, word, lower):
    Vocabulary([*SPECIAL_TOKENS, *WORDS, word]).write(text / "vocab.txt")
    run(text, tmp_path / "unused", "--do_lower_case", lower)  # in the vocabulary, but not in the text
    (text / "training1.txt").write_text(f"the cat\n\nthe {word}\n")
    with pytest.raises(InputError, match=f"training1.txt: word {word!r} is not one token.*--do_lower_case {lower}"):
        run(text, tmp_path / "out", "--do_lower_case", lower)


def test_upper_case_words_with_a_cased_tokenizer(text, tmp_path):
    Vocabulary([*SPECIAL_TOKENS, *WORDS, "Cat"]).write(text / "vocab.txt")
    (text / "training1.txt").write_text("the Cat runs\n")
    run(text, tmp_path / "out", "--do_lower_case", 0)
    tokenizer = resolve_tokenizer("bert-large-uncased", [tmp_path / "out"])
    samples = read_samples(tmp_path / "out" / "train_shard_1.hdf5")
    assert tokenizer("the Cat runs")["input_ids"][2] == 13
    assert samples.input_ids.shape == (1, 32)


def test_no_text(tmp_path):
    Vocabulary([*SPECIAL_TOKENS, *WORDS]).write(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match=r"no training\{i\}.txt or test\{i\}.txt; make text with generate_pretraining"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "flags", [["--do_lower_case", "2"], ["--masked_lm_prob", "1.5"], ["--dup_factor", "0"], ["--seed", "-1"], ["--nope"]]
)
def test_wrong_flags_exit_with_2(text, tmp_path, flags):
    with pytest.raises(SystemExit) as exit_code:
        run(text, tmp_path / "out", *flags)
    assert exit_code.value.code == 2


def test_as_a_script_errors_have_no_traceback(text, tmp_path):
    (text / "training0.txt").write_text("the bird\n")
    command = [sys.executable, SCRIPT, "--dir", text, "-o", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "generate_samples.py: error: " in result.stderr and "'bird'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_manifest_lists_every_file(text, tmp_path):
    run(text, tmp_path / "out")
    files = read_json(tmp_path / "out" / "manifest_samples.json")["files"]
    assert set(digests(tmp_path / "out")) == {*files, "manifest_samples.json"}
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    assert files["test_shard_0.hdf5"]["samples"] == 40
