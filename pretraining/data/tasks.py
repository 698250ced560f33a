"""Downstream tasks: labelled sentences from CSV files or GLUE, their checks, and their encoding for a model.

A CSV file has the columns `text,label`, one word of the data is one token, and a word that the model does not know is an error:
these are sentences of a known language. One's own labels are such files, too:

    text,label
    "learn great mark piece",0
    "great enough shade shade",3

A label is the number of a class, and each sentence has one. The name of the task is that of the training file, without .csv.
Names of classes are optional, in TASK_labels.json next to the training file: {"names": {"0": "verb", "3": "noun"}}. A label
that is not among them is an error.

A GLUE task (Wang et al. 2019) is natural text, of single sentences or of pairs, in the columns and labels of the hub's
nyu-mll/glue. The tokenizer splits its words, unknown ones become [UNK], and sentences that are too long are cut; all of these
are counted. Only [SEP] separates the two sentences of a pair, [CLS] a [SEP] b [SEP]: the models' pre-training data is one
segment.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pcfg.common.files import InputError, describe_file, read_json
from pcfg.common.text import csv_rows, read_labelled, read_texts, shown
from pretraining.data.contexts import Contexts, check_length, from_texts
from pretraining.data.masking import check_lengths
from pretraining.data.vocabulary import Vocabulary, check_single_tokens, hub_is_off, resolve_tokenizer
from pretraining.model.checkpoints import check_folder, load_vocabulary
from pretraining.model.config import ModelConfig

GLUE_REPOSITORY = "nyu-mll/glue"
GlueFormat = tuple[tuple[str, ...], tuple[str, ...]]  # columns of text, names of the labels 0, 1, ...
GLUE: dict[str, GlueFormat] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": (("sentence",), ("negative", "positive")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
GLUE_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass
class Part:
    """The sentences of one file."""

    file: Path  # their source
    texts: list[str]  # sentences, or the first ones of pairs
    pairs: list[str] | None  # the second ones of pairs; None for single sentences
    # labels: (sentences,) int64 as in the file, indices into `Task.classes` in a task (-1: none of them); None for a file
    # without labels
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, number: int | None) -> "Part":
        """Its first `number` sentences; all for None."""
        pairs = None if self.pairs is None else self.pairs[:number]
        labels = None if self.labels is None else self.labels[:number]
        return Part(self.file, self.texts[:number], pairs, labels)


@dataclasses.dataclass
class Task:
    """Labelled sentences for training and measuring."""

    name: str  # of GLUE's task, else the stem of the training file
    # train, validation: their labels are indices into `classes`
    train: Part
    validation: Part
    test: Part | None  # sentences to predict the labels of, labelled or not; or None
    classes: list[int]  # the labels that occur in training or validation, sorted; all labels of a GLUE task
    majority: float  # share of validation sentences with the most frequent training label: the accuracy without features
    overlap: int  # number of validation sentences that are also training sentences
    pieces: bool  # whether the tokenizer may split words (natural text), instead of one token per word

    def parts(self) -> list[Part]:
        """Training, validation and, if there is one, test."""
        return [part for part in (self.train, self.validation, self.test) if part is not None]

    def inputs(self) -> dict[str, dict[str, str]]:
        """The files, for a record."""
        return {split: describe_file(part.file) for split, part in zip(GLUE_SPLITS, self.parts(), strict=False)}


def read_task(options: Any, with_test: bool = False) -> Task:
    """Read and check the files of a task; odd data that are no error are counted in a printed warning.

    `options` are `DownstreamArguments`; their test file (of GLUE without files, its test split) is read `with_test` only.
    """
    if options.task_name not in (None, *GLUE):
        raise InputError(f"--task_name {options.task_name}: is none of GLUE's classifications, {', '.join(GLUE)}")
    glue = GLUE.get(options.task_name)
    splits = GLUE_SPLITS if with_test else GLUE_SPLITS[:2]
    files: dict[str, Any] = {split: getattr(options, f"{split}_file", None) for split in splits}
    if glue is not None and files["train"] is None:
        hub = _hub_files(options.task_name)
        files = {split: file or hub[split] for split, file in files.items()}
    for split, file in files.items():
        if file is None:
            raise InputError(f"--{split}_file: give the file, or --task_name for GLUE's data from the hub")
    parts = [_read_part(Path(file), glue, split == "test") for split, file in files.items()]
    if glue is None:
        _check_label_names(parts)
    train, validation, *test = parts
    for part in (train, validation):
        _labels(part)
    train = train.first(options.max_train_samples)
    labels = _check_classes(train) + _labels(validation)
    classes = list(range(len(glue[1]))) if glue else sorted(set(labels))
    overlap = _warn_of_odd_parts(train, validation)
    for part in (train, validation, *test):
        _index_labels(part, classes)
    majority = float(np.mean(validation.labels == np.bincount(np.asarray(train.labels)).argmax()))
    pieces = options.tokenization == "pieces" or (options.tokenization == "auto" and glue is not None)
    if train.pairs is not None and not pieces:
        raise InputError("--tokenization words: is for single sentences; pairs are encoded as pieces")
    name = options.task_name or train.file.stem
    return Task(name, train, validation, test[0] if test else None, classes, majority, overlap, pieces)


def read_labelled_part(path: Path) -> tuple[Part, list[int]]:
    """The sentences of a CSV file `text,label`, labelled by indices into its classes, and the classes: its labels, sorted."""
    part = _read_part(path, None, is_test=False)
    _check_label_names([part])
    classes = sorted(set(_check_classes(part)))
    _index_labels(part, classes)
    return part, classes


def _labels(part: Part) -> list[int]:
    """The labels of a part; refuses one without labels."""
    if part.labels is None or (part.labels < 0).any():
        raise InputError(f"{part.file}: not labelled; give a training and a validation file with labels")
    return part.labels.tolist()


def _check_classes(part: Part) -> list[int]:
    """The labels of a part for training; refuses one with a single class."""
    labels = _labels(part)
    if len(set(labels)) < 2:
        raise InputError(f"{part.file}: all labels are {labels[0]}; a task needs at least 2 classes")
    return labels


def _read_part(path: Path, glue: GlueFormat | None, is_test: bool) -> Part:
    """The sentences of one file, with its labels as numbers; a test file may have none."""
    if glue is not None:
        return _read_glue(path, *glue, is_test)
    # In any other file than a test file, missing labels are an error of read_labelled.
    if is_test and "label" not in csv_rows(path, ("text",))[1][0]:
        return Part(path, read_texts(path), None, None)
    texts, labels = read_labelled(path)
    return Part(path, texts, None, np.array(labels, np.int64))


def _hub_files(task: str) -> dict[str, Path]:
    """The files of a GLUE task from the hub (its local cache, unless HF_HUB_OFFLINE=0), by split; refused without delay."""
    from huggingface_hub import snapshot_download  # slow to import

    try:
        folder = snapshot_download(
            GLUE_REPOSITORY, repo_type="dataset", allow_patterns=f"{task}/*", local_files_only=hub_is_off()
        )
        names = {split: f"{split}_matched" if task == "mnli" and split != "train" else split for split in GLUE_SPLITS}
        return {split: list(Path(folder, task).glob(f"{name}-*.parquet"))[0] for split, name in names.items()}
    except (OSError, ValueError, IndexError) as error:
        reason = "files are missing" if isinstance(error, IndexError) else str(error).splitlines()[0]
        why = "the hub is off; HF_HUB_OFFLINE=0 turns it on" if hub_is_off() else reason
        columns = ",".join((*GLUE[task][0], "label"))
        raise InputError(
            f"--task_name {task}: {GLUE_REPOSITORY} is not in the hub's local cache ({why}); or give --train_file and "
            f"--validation_file with the columns {columns} (.csv, .tsv or the hub's .parquet)"
        ) from None


def _read_glue(path: Path, columns: tuple[str, ...], names: tuple[str, ...], is_test: bool) -> Part:
    """A file of a GLUE task: `.csv` or `.tsv` with a header, or the hub's `.parquet`; labels are numbers or names."""
    values = {**{str(number): number for number in range(-1, len(names))}, **{name: i for i, name in enumerate(names)}}
    if path.suffix == ".parquet":
        lines, table = _parquet_columns(path, columns)
    else:
        lines, rows = csv_rows(path, columns)
        table = {column: [row[column] for row in rows] for column in rows[0]}
    texts = [[str(text or "").strip() for text in table[column]] for column in columns]
    if empty := sum("" in row for row in zip(*texts, strict=True)):
        print(f"warning: {empty} of {len(lines)} rows of {path} have an empty text")
    labels = None
    if "label" not in table and not is_test:
        others = [column for column in table if column not in columns]
        similar = [column for column in others if all(str(label).strip() in values for label in table[column])]
        advice = f"rename its column {similar[-1]!r} to 'label'" if similar else f"it has {', '.join(map(str, table))}"
        raise InputError(f"{path}: no column 'label'; {advice} and give the file again (--train_file, --validation_file)")
    if "label" in table:
        labels = np.array([values.get(str(label).strip(), -2) for label in table["label"]], np.int64)
        if (labels == -2).any():
            row = int(np.argmax(labels == -2))
            known = ", ".join(f"{number} or {name}" for number, name in enumerate(names))
            raise InputError(f"{path}:{lines[row]}: label {shown(str(table['label'][row]))}; it must be {known}")
    if labels is not None and (labels == -1).all():
        labels = None  # GLUE keeps those of its test sets to itself
    return Part(path, texts[0], texts[1] if len(texts) > 1 else None, labels)


def _parquet_columns(path: Path, columns: tuple[str, ...]) -> tuple[list[int], dict]:
    """Row numbers from 1, and the columns of a parquet file, of which `columns` are text."""
    from pyarrow import ArrowException  # slow to import
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except (OSError, ArrowException) as error:
        raise InputError(f"{path}: can't be read ({str(error).splitlines()[0]}); download it again") from None
    if missing := [column for column in columns if column not in table.column_names]:
        raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise InputError(f"{path}: no sentences; the file is empty")
    for column in columns:
        kind = table.schema.field(column).type
        content = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
        if str(content) not in ("string", "large_string", "string_view"):
            raise InputError(f"{path}: column {column!r} is {kind}, not text; give a file whose {column!r} is of type string")
    return list(range(1, len(table) + 1)), table.to_pydict()


def _check_label_names(parts: list[Part]) -> None:
    """Refuse labels that are missing from the JSON of label names next to the training file, if there is one."""
    path = parts[0].file.with_name(f"{parts[0].file.stem}_labels.json")
    if not path.exists():
        return
    names = read_json(path).get("names")
    if not isinstance(names, dict):
        raise InputError(f"{path}: has no 'names' of labels; make it again with generate_downstream.py, or remove it")
    for part in parts:
        labels = [] if part.labels is None else part.labels.tolist()
        if unknown := next((number for number, label in enumerate(labels, 1) if str(label) not in names), None):
            raise InputError(
                f"{part.file}: label {labels[unknown - 1]} of sentence {unknown} is not one of the {len(names)} in {path}; "
                "are the two files of one task?"
            )


def _warn_of_odd_parts(train: Part, validation: Part) -> int:
    """Print reasons why an accuracy may mislead; returns the number of validation sentences that are training sentences."""
    labels = _labels(validation)
    seen = set(_labels(train))
    if unseen := sum(label not in seen for label in labels):
        print(f"warning: {unseen} of {len(labels)} sentences of {validation.file} have a label that no training sentence has")
    if len(set(labels)) < 2:
        print(f"warning: all {len(labels)} sentences of {validation.file} have the label {labels[0]}")
    shared = set(zip(train.texts, train.pairs or train.texts, strict=True))
    if overlap := sum(row in shared for row in zip(validation.texts, validation.pairs or validation.texts, strict=True)):
        print(f"warning: {overlap} of {len(labels)} sentences of {validation.file} are also in {train.file}")
    return overlap


def _index_labels(part: Part, classes: list[int]) -> None:
    """Turn labels into indices into `classes`; -1, with a warning, for other labels of a test file."""
    if part.labels is None:
        return
    index = {label: number for number, label in enumerate(classes)}
    part.labels = np.array([index.get(label, -1) for label in part.labels.tolist()], np.int64)
    if unknown := int((part.labels < 0).sum()):
        print(f"warning: {unknown} of {len(part)} sentences of {part.file} have a label that is none of the task's")


def encode_task(task: Task, folder: Path, config: ModelConfig, options: Any) -> list[Contexts]:
    """The sentences of each of `task.parts()` as inputs of the model in `folder`; `options`: `DownstreamArguments`."""
    vocabulary = load_vocabulary(folder)
    tokenizer = None
    if options.tokenizer_name is not None or task.pieces:
        name = str(folder) if options.tokenizer_name is None else options.tokenizer_name
        check_folder(folder)  # the tokenizer's files, which no other check reads
        tokenizer = resolve_tokenizer(name, [folder])
        if tokenizer.get_vocab() != vocabulary.ids:
            raise InputError(
                f"--tokenizer_name {name}: its {len(tokenizer)} words are not the {vocabulary.size} of "
                f"the model in {folder}; leave the flag out to take the model's own"
            )
    if task.pieces:
        positions = min(options.max_seq_length, config.max_position_embeddings)
        return [_encode_pieces(part, tokenizer, vocabulary, positions) for part in task.parts()]
    if tokenizer is not None:
        check_single_tokens(tokenizer, sorted({word for part in task.parts() for text in part.texts for word in text.split()}))
    encoded = []
    for part in task.parts():
        contexts = from_texts(part.texts, vocabulary, part.file)
        check_lengths(contexts.lengths - 2, options.max_seq_length, part.file)
        check_length(contexts, config.max_position_embeddings, part.file)
        encoded.append(contexts)
    return encoded


def _encode_pieces(part: Part, tokenizer: Any, vocabulary: Vocabulary, positions: int) -> Contexts:
    """Sentences or pairs as the tokenizer's pieces, cut to `positions` tokens; losses are counted and printed."""
    columns = [part.texts] if part.pairs is None else [part.texts, part.pairs]
    flags = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids = tokenizer(*columns, **flags)["input_ids"]
    if cut := [row for row, tokens in enumerate(ids) if len(tokens) > positions]:
        print(f"warning: {len(cut)} of {len(ids)} rows of {part.file} are longer than {positions} tokens and were cut")
        shorter = tokenizer(
            *([column[row] for row in cut] for column in columns), truncation=True, max_length=positions, **flags
        )
        for row, tokens in zip(cut, shorter["input_ids"], strict=True):
            ids[row] = tokens
    lengths = np.array([len(tokens) for tokens in ids], np.int64)
    inside = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(inside.shape, vocabulary.pad_id, np.int64)
    input_ids[inside] = np.concatenate([np.asarray(tokens, np.int64) for tokens in ids])
    if unknown := int((input_ids == vocabulary.unk_id).sum()):
        print(f"warning: {unknown:,} of {int(lengths.sum()):,} tokens of {part.file} are [UNK], unknown to the model")
    sentence, position = np.nonzero(inside & ~np.isin(input_ids, (vocabulary.cls_id, vocabulary.sep_id)))
    return Contexts(input_ids, lengths, sentence, position, input_ids[sentence, position], vocabulary.mask_id)
