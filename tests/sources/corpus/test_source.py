"""The real main() of generate_pretraining on a corpus: splits, duplicates, resume, refusals."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import generate_pretraining
from pcfg.common.files import InputError, read_json
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.sources.corpus import source as corpus
from pretraining.sources.corpus.source import INDEX, Layout, train_wordpiece
from pretraining.sources.text_shards import Shard

ROOT = Path(__file__).parents[3]
SIZES = "--shard-num 3 --test-shard-num 2 --test-fraction 0.2 --vocab-size 200 --n_processes 1".split()


def words(seed, number=30):
    return [f"w{n}" for n in np.random.default_rng(seed).integers(50, size=number)]


def document(seed):
    chosen = words(seed)
    return ". ".join(" ".join(chosen[i : i + 6]).capitalize() for i in range(0, 30, 6)) + "."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three files in two formats; documents 0..19 are in two of them, and twice in one."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.txt").write_text("\n\n".join(document(i) for i in range(60)))
    rows = [document(i) for i in (*range(20), *range(60, 100), *range(10))]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, "", "  "]))
    with gzip.open(folder / "c.txt.gz", "wt") as file:
        file.write("\n\n".join(document(i).replace(" ", "\n", 3) for i in range(90, 130)))  # other white space, the same text
    return folder


def generate(source, folder, *more):
    arguments = ["--source", "corpus", "--dataset", source, "--save-path", folder, *SIZES, *more]
    generate_pretraining.main(list(map(str, arguments)))


def read(folder, split):
    """The documents of a split, each its lines, shard after shard."""
    texts = [(folder / f"{split}{i}.txt").read_text() for i in range(3 if split == "training" else 2)]
    return [[text.splitlines() for text in shard.split("\n\n")] for shard in texts]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest_pretraining.json"}


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "data"
    generate(source, folder)
    return folder


def test_every_document_once_in_order(made):
    """One sentence a line, an empty line between documents; each document on one side and in one shard."""
    everything = [(document(i), split) for i in range(130) for split in ("training", "test")]
    found = {split: [" ".join(lines) for shard in read(made, split) for lines in shard] for split in ("training", "test")}
    assert len(found["training"]) + len(found["test"]) == 130
    for split, documents in found.items():
        assert documents == [text for text, of in everything if of == split and text in set(documents)]
        sizes = [len(shard) for shard in read(made, split)]
        assert max(sizes) - min(sizes) <= 1
    assert not set(found["training"]) & set(found["test"]) and 10 < len(found["test"]) < 45
    assert all(line.count(" ") == 5 for shard in read(made, "test") for lines in shard for line in lines)
    counts = read_json(made / "corpus_counts.json")
    assert counts["documents that were there before"] == 20 + 10 + 10 and counts["documents without a sentence"] == 2
    assert counts["documents read"] == 60 + 72 + 40 and counts["sentences"] == 5 * 170
    assert counts["training documents"] + counts["test documents"] == 130
    manifest = read_json(made / "manifest_pretraining.json")
    assert manifest["made_from"]["source"] == "corpus" and manifest["files"]["test0.txt"]["documents"] > 5
    assert not (made / "parts").exists()


def test_the_vocabulary(made):
    vocabulary = Vocabulary.read(made / "vocab.txt")
    assert tuple(vocabulary.words[:5]) == SPECIAL_TOKENS and vocabulary.size <= 200
    assert any(word.startswith("##") for word in vocabulary.words)


def test_ranges_and_processes_change_nothing(source, made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    generate(source, tmp_path / "two", "--n_processes", 2)
    assert contents(tmp_path / "two") == contents(made)
    monkeypatch.setattr("pretraining.sources.corpus.documents.RANGE_BYTES", 500)
    generate(source, tmp_path / "ranges")
    assert contents(tmp_path / "ranges") == contents(made)


def test_a_failure_between_parts_loses_nothing(source, made, tmp_path, monkeypatch, capsys):
    """Parts that were made are not read again, and shards that were made are not written again."""
    calls = []
    make_part = corpus.make_part

    def fails_at_last(*arguments):
        calls.append(arguments[-1][0])
        if len(calls) == 3:
            raise RuntimeError("killed")
        return make_part(*arguments)

    monkeypatch.setattr(corpus, "make_part", fails_at_last)
    with pytest.raises(RuntimeError):
        generate(source, tmp_path)
    make_shard = corpus.make_shard

    def fails_when_written(*arguments):
        make_shard(*arguments)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "make_shard", fails_when_written)
        with pytest.raises(RuntimeError):
            generate(source, tmp_path)
    assert calls == [0, 1, 2, 2] and "3 pieces, 2 are read already" in capsys.readouterr().out
    generate(source, tmp_path)
    assert len(calls) == 4
    assert contents(tmp_path) == contents(made)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.txt")}
    generate(source, tmp_path)
    assert len(calls) == 4 and {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.txt")} == stamps
    (tmp_path / "training1.txt").write_text("damaged")
    generate(source, tmp_path)
    assert contents(tmp_path) == contents(made) and len(calls) == 7
    assert (tmp_path / "training0.txt").stat().st_mtime_ns == stamps[tmp_path / "training0.txt"]


def test_a_kill(source, made, tmp_path):
    """SIGKILL while two processes read; whatever was there, the rerun gives the same bytes."""
    command = [sys.executable, str(ROOT / "generate_pretraining.py"), "--source", "corpus", "--dataset", str(source)]
    command += ["--save-path", str(tmp_path / "data"), *SIZES]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("data/parts/part*.npy")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    generate(source, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(made)


def test_rows_that_are_sentences(tmp_path):
    rows = [f"sentence number {i} . it is not split ." for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    generate(tmp_path / "a.jsonl", tmp_path / "data", "--sentences-a-document", 4)
    shards = [*read(tmp_path / "data", "training"), *read(tmp_path / "data", "test")]
    documents = sorted((lines for shard in shards for lines in shard), key=lambda lines: rows.index(lines[0]))
    assert documents == [rows[i : i + 4] for i in range(0, 400, 4)]


def test_damaged_files(source, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_bytes((source / "a.txt").read_bytes())
    whole = (source / "c.txt.gz").read_bytes()
    (folder / "b.txt.gz").write_bytes(whole[:-400])
    with pytest.raises(InputError, match=r"b.txt.gz: cut short or damaged .*; fetch it again, or give --skip-damaged"):
        generate(folder, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.txt"))
    generate(folder, tmp_path / "data", "--skip-damaged", "--overwrite")
    counts = read_json(tmp_path / "data" / "corpus_counts.json")
    assert counts["damaged files"] == 1 and counts["documents read"] >= 60


def test_refusals(source, made, tmp_path):
    with pytest.raises(InputError, match="vocabulary was 'WordPiece of 200 entries, lower case 1', now"):
        generate(source, made, "--do_lower_case", 0)
    with pytest.raises(InputError, match=r"test documents for 50 shards \(.*; give fewer --test-shard-num or a larger"):
        generate(source, tmp_path / "x", "--test-shard-num", 50)
    with pytest.raises(InputError, match="--test-shard-num 2 --test-fraction 0: both are 0 or neither"):
        generate(source, tmp_path / "x", "--test-fraction", 0)
    with pytest.raises(InputError, match=r"vocab\.txt.*special token"):
        (tmp_path / "vocab.txt").write_text("[PAD]\nword\n")
        generate(source, tmp_path / "y", "--vocab-file", tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="--dataset nowhere: no such file or folder, and the hub is off"):
        generate("nowhere", tmp_path / "z")
    with pytest.raises(InputError, match=r"a\.txt.*none|no column|can't tell"):
        (tmp_path / "a.csv").write_text("text\n")
        generate(tmp_path / "a.csv", tmp_path / "z")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            json.dumps([{"text": "A sentence."}]),
            r"\(lines that are no JSON object: 1\); JSON lines have one object per",
        ),
        (
            "a.jsonl",
            '{"text": 5}\n{"text": null}\n',
            r"\(not a string: 1; null: 1\); give the column of the text by --text-column",
        ),
        ("a.txt", "", r"\(the files have no rows\); give files with text"),
    ],
)
def test_a_corpus_without_documents_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"0 training documents for \d+ shards {message}"):
        generate(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("seed", range(5))
def test_the_layout_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    indices = []
    for number in rng.integers(0, 12, 4):
        index = np.zeros(number, dtype=INDEX)
        index["hash"] = rng.integers(0, 3, (number, 2)).astype(np.uint64) << np.uint64(62)
        index["size"] = rng.integers(1, 100, number)
        indices.append(index)
    layout = Layout(indices, 0.4)
    expected, seen = [], set()
    for part, index in enumerate(indices):
        offset = 0
        for entry in index:
            key = tuple(entry["hash"].tolist())
            if key not in seen:
                expected.append((part, offset, int(entry["size"]), key[0] / 2**64 < 0.4))
            seen.add(key)
            offset += int(entry["size"]) + 1
    found = zip(layout.part.tolist(), layout.offset.tolist(), layout.size.tolist(), layout.is_test.tolist(), strict=True)
    assert list(found) == expected and layout.duplicates == sum(map(len, indices)) - len(expected)
    for split in ("training", "test"):
        dealt = np.concatenate([layout.of(Shard(split, i, 0), 3) for i in range(3)])
        assert dealt.tolist() == [i for i, document in enumerate(expected) if document[3] == (split == "test")]


def test_training_a_vocabulary_is_deterministic():
    texts = [document(i) for i in range(200)]
    first = train_wordpiece(lambda: texts, 60, True)
    assert all(first == train_wordpiece(lambda: texts, 60, True) for _ in range(5)) and len(first) == 60
    assert all(word == word.lower() for word in first[5:])
    assert any(word != word.lower() for word in train_wordpiece(lambda: texts, 60, False)[5:])
    with pytest.raises(InputError, match="--vocab-size 10: single characters alone take"):
        train_wordpiece(lambda: ["abcdefghijklmnop" * 3], 10, True)
