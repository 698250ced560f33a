"""Text and tasks from a table of tagged sentences: 60 documents in two genres, whose sentences partly repeat."""

import gzip
import itertools
import json

import numpy as np
import pytest

from pcfg.common.files import InputError
from pcfg.common.text import read_labelled, read_texts
from pretraining.data.tasks import read_task
from pretraining.evaluation.probes import ProbeArguments
from pretraining.sources import tagged

NAMES = ("genre", "tag3")


@pytest.fixture
def table():
    """Rows (document, genre, words, tags); the third word is a noun, a verb or, rarely, `zz` with the tag `x`."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        genre = "ab"[number % 2]
        for _ in range(12):
            third, tag = [("stone", "nn-tl"), ("run", "vb"), ("zz", "x")][int(rng.choice(3, p=[0.5, 0.4, 0.1]))]
            last = f"{genre}{rng.integers(200)}"
            rows.append((f"d{number:02d}", genre, f"The `` {third} {last} .", f"at `` {tag} np ."))
    return rows


def write(rows, path):
    text = "".join("\t".join(row) + "\n" for row in [("document", "genre", "words", "tags"), *rows])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def run(path, folder, *flags):
    tagged.main([str(path), str(folder), "--label", "genre", "--vocab-size", "300", *flags])
    return folder


def test_no_sentence_is_in_two_parts_and_labels_are_those_of_the_table(table, tmp_path):
    folder = run(write(table, tmp_path / "t.tsv.gz"), tmp_path / "out", "--tags", "2")
    text = {path.stem: read_texts(path) for path in (folder / "text").iterdir()}
    assert len(text) == 42  # of 60 documents
    parts = {"text": set(itertools.chain(*text.values()))}
    assert parts["text"] == {words.replace("``", '"') for document, _, words, _ in table if document in text}
    for task in NAMES:
        names = json.loads((folder / f"{task}_labels.json").read_text())["names"]
        for split in ("", "_validation"):
            texts, labels = read_labelled(folder / f"{task}{split}.csv")
            parts[task + split] = set(texts)
            assert len(set(texts)) == len(texts) >= 5
            for sentence, label in zip(texts, labels, strict=True):
                words = sentence.split()
                assert names[str(label)] == (words[3][0] if task == "genre" else {"stone": "nn", "run": "vb"}[words[2]])
    for first, second in itertools.combinations(parts, 2):
        if {first, second} not in ({"genre", "tag3"}, {"genre_validation", "tag3_validation"}):
            assert not parts[first] & parts[second]
    assert "zz" in " ".join(parts["genre"])  # is no class of the other task
    vocabulary = (folder / "vocab.txt").read_text().split("\n")
    assert {"[MASK]", "the", "stone", "run"} <= set(vocabulary)
    files = {"train_file": str(folder / "tag3.csv"), "validation_file": str(folder / "tag3_validation.csv")}
    assert read_task(ProbeArguments(**files)).classes == [0, 1]


def test_it_is_a_function_of_the_seed(table, tmp_path):
    path = write(table, tmp_path / "t.tsv")
    first, same = (run(path, tmp_path / name) for name in ("first", "same"))
    other = run(path, tmp_path / "other", "--seed", "1")
    for name in ("genre.csv", "tag3_validation.csv", "vocab.txt"):
        assert (first / name).read_bytes() == (same / name).read_bytes()
    assert (first / "genre.csv").read_bytes() != (other / "genre.csv").read_bytes()


def test_split_words_before_the_position_drop_a_sentence(table, tmp_path):
    odd = [(document, genre, words.replace("The", "Xylo-phone"), tags) for document, genre, words, tags in table[::2]]
    folder = run(write([*odd, *table[1::2]], tmp_path / "t.tsv"), tmp_path / "out")
    texts = [read_texts(folder / f"{name}.csv") for name in NAMES]
    assert any("Xylo" in text for text in texts[0]) and not any("Xylo" in text for text in texts[1])


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda rows: [*rows, ("d01", "a", "two words", "nn")], (), r"t.tsv:722: 2 words, but 1 tags"),
        (lambda _: [("../d01", "a", "word", "nn")], (), r"t.tsv:2: document '../d01'"),
        (lambda rows: rows[:12], (), "1 documents are too few: none is left for training"),
        (lambda rows: rows, ("--position", "6"), "--position 6: sentences may have 5 words"),
    ],
)
def test_bad_input(table, tmp_path, change, flags, message):
    with pytest.raises(InputError, match=message):
        run(write(change(table), tmp_path / "t.tsv"), tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive(tmp_path, table):
    path = write(table, tmp_path / "t.tsv.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="t.tsv.gz: cut short or damaged"):
        run(path, tmp_path / "out")
