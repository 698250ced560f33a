"""Text for pre-training and two labelled tasks from a table of tagged sentences, such as the Brown corpus.

    python -m pretraining.sources.tagged brown_tags.tsv.gz FOLDER --label genre

The table (.tsv or .csv, also with .gz) has one row per sentence. Its columns are `document`, `words`, `tags` (one per word,
both separated by spaces), and the label of the sentence, named by --label. Of ten documents of one label, seven are for
pre-training, two for training on a task, one for its validation. No sentence of a task is in the text for pre-training, or in
two parts. Written into FOLDER, which must not exist:

    text/DOCUMENT.txt                     for generate_pretraining.py --source corpus --dataset FOLDER/text
    vocab.txt                             WordPiece vocabulary of that text, for its --vocab-file
    genre.csv, genre_validation.csv       columns text,label: the label of the sentence
    tag3.csv, tag3_validation.csv         the tag of the third word (--position 3); up to there one word is one token
    genre_labels.json, tag3_labels.json   the name of each label

A tag counts by the letters that it begins with: np-tl and np$ are np.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import dataclasses
import re
from collections import Counter
from pathlib import Path

from pcfg.common.cli import Parser, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError, atomic_folder, keyed_rng, sha256, write_json
from pcfg.common.text import csv_rows, write_labelled

PARTS = ("text", *("training",) * 2, "validation", *("text",) * 6)  # of ten documents of a label
QUOTES = {"``": '"', "''": '"'}  # as natural text has them


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A row of the table."""

    document: str
    label: str
    words: list[str]
    tags: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read_table(path: Path, label: str) -> list[Sentence]:
    """The sentences of a table, in order."""
    lines, rows = csv_rows(path, ("document", label, "words", "tags"))
    sentences = []
    for line, row in zip(lines, rows, strict=True):
        words = [QUOTES.get(word, word) for word in row["words"].split()]
        tags = [re.match("[A-Za-z]+|.", tag)[0] for tag in row["tags"].split()]  # type: ignore[index]
        if len(words) != len(tags):
            raise InputError(f"{path}:{line}: {len(words)} words, but {len(tags)} tags; give one tag per word")
        if not re.fullmatch(r"[\w-][\w.-]*", row["document"]):
            raise InputError(f"{path}:{line}: document {row['document']!r}; use letters, digits, '_' and '-', it names a file")
        sentences.append(Sentence(row["document"], row[label], words, tags))
    return sentences


def divide(sentences: list[Sentence], seed: int) -> dict[str, list[Sentence]]:
    """The sentences of each of `PARTS`, by document; in those of the tasks, only sentences that are in no other place."""
    labels = {sentence.document: sentence.label for sentence in reversed(sentences)}  # that of the first sentence
    shuffled = keyed_rng(seed, "documents").permutation(sorted(labels)).tolist()
    order = sorted(shuffled, key=labels.__getitem__)
    part_of = {document: PARTS[number % len(PARTS)] for number, document in enumerate(order)}
    parts: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    texts: set[str] = set()
    for part, members in parts.items():
        for sentence in sentences:
            text = sentence.text.lower()  # as the vocabulary has it
            if part_of[sentence.document] == part and (part == "text" or text not in texts):
                members.append(sentence)
                texts.add(text)
        if not members:
            raise InputError(f"{len(labels)} documents are too few: none is left for {part}; give a table of more")
    return parts


def write_task(folder: Path, task: str, parts: dict[str, list[tuple[str, str]]], options: argparse.Namespace) -> None:
    """Write the CSV files of a task, at most as many rows as the flags say, and its labels; `parts`: texts with label names."""
    numbers = {name: number for number, name in enumerate(sorted({label for _, label in parts["training"]}))}
    most = {"training": options.sentence_num, "validation": options.validation_num}
    for split, rows in parts.items():
        known = [row for row, (_, label) in enumerate(rows) if label in numbers]
        chosen = [rows[row] for row in keyed_rng(options.seed, f"{task} {split}").permutation(known)[: most[split]].tolist()]
        file = folder / f"{task}{'' if split == 'training' else '_validation'}.csv"
        write_labelled(file, [text for text, _ in chosen], [numbers[label] for _, label in chosen])
        print(f"{options.folder / file.name}: {len(chosen)} rows of {len(rows)}, {len(numbers)} labels")
    write_json(folder / f"{task}_labels.json", {"names": {str(number): name for name, number in numbers.items()}})


def tag_task(parts: dict[str, list[Sentence]], entries: set[str], position: int, classes: int) -> dict:
    """Texts with their tags at `position` in each part, of the most frequent `classes` there in training."""
    rows: dict[str, list[tuple[str, str]]] = {}
    frequent: set[str] = set()
    for split in ("training", "validation"):
        # A word that the tokenizer splits would move the position.
        whole = [sentence for sentence in parts[split] if {word.lower() for word in sentence.words[:position]} <= entries]
        tagged = [(sentence.text, sentence.tags[position - 1]) for sentence in whole]
        frequent = frequent or {tag for tag, _ in Counter(tag for _, tag in tagged).most_common(classes)}
        rows[split] = [(text, tag) for text, tag in tagged if tag in frequent]
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.sources.tagged", description=__doc__)
    parser.add_argument("table", type=Path, help="table of tagged sentences")
    parser.add_argument("folder", type=Path, help="output folder; must not exist")
    parser.add_argument("--label", required=True, help="column of the label of a sentence; also the name of its task")
    parser.add_argument("--position", type=positive_int, default=3, help="of the tag, in words from 1; default 3")
    parser.add_argument("--tags", type=positive_int, default=12, help="most frequent tags that are classes; default 12")
    parser.add_argument("--min-words", type=positive_int, default=5, help="shortest sentence of a task; default 5")
    parser.add_argument("--sentence-num", type=positive_int, default=4_000, help="training rows at most; default 4000")
    parser.add_argument("--validation-num", type=positive_int, default=2_000, help="validation rows at most; default 2000")
    parser.add_argument("--vocab-size", type=positive_int, default=8_000, help="entries of the vocabulary; default 8000")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the choice of documents and rows; default 0")
    return parser


def main(arguments: list[str] | None = None) -> None:
    from pretraining.sources.corpus.source import train_wordpiece  # slow to import

    options = build_parser().parse_args(arguments)
    if options.folder.exists():
        raise InputError(f"{options.folder}: exists already; give another folder, or remove it")
    if options.position > options.min_words:
        raise InputError(f"--position {options.position}: sentences may have {options.min_words} words; raise --min-words")
    parts = divide(read_table(options.table, options.label), options.seed)
    with atomic_folder(options.folder) as folder:
        text: dict[str, list[str]] = {}
        for sentence in parts["text"]:
            text.setdefault(sentence.document, []).append(sentence.text)
        (folder / "text").mkdir()
        for document, lines in text.items():
            (folder / "text" / f"{document}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        entries = train_wordpiece(lambda: (sentence.text for sentence in parts["text"]), options.vocab_size, do_lower_case=True)
        (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
        splits = ("training", "validation")
        tasks = {split: [row for row in parts[split] if len(row.words) >= options.min_words] for split in splits}
        labelled = {split: [(row.text, row.label) for row in rows] for split, rows in tasks.items()}
        write_task(folder, options.label, labelled, options)
        write_task(folder, f"tag{options.position}", tag_task(tasks, set(entries), options.position, options.tags), options)
        flags = {name: value for name, value in vars(options).items() if name not in ("table", "folder")}
        write_json(folder / "made_from.json", {**flags, "table_sha256": sha256(options.table)})
    print(f"{options.folder}: {len(text)} documents, {len(parts['text'])} sentences for pre-training")


if __name__ == "__main__":
    run_main(main)
