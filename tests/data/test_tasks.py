"""Tasks from CSV files and from GLUE's, what is refused or counted in them, and natural text as the tokenizer's pieces."""

import json
import socket
import types

import numpy as np
import pytest

from pcfg.common.files import InputError, write_json
from pretraining.data.tasks import GLUE, encode_task, read_task
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary, save_tokenizer
from pretraining.model.config import ModelConfig
from tests.bert_tokenizer import build_tokenizer

QNLI = "question\tsentence\tlabel\n"


def options(folder, **changes):
    """The flags that a task depends on, with files train.csv and validation.csv in `folder`."""
    values = {
        **{"task_name": None, "train_file": folder / "train.csv", "validation_file": folder / "validation.csv"},
        **{"test_file": None, "max_train_samples": None, "tokenization": "auto", "tokenizer_name": None, "max_seq_length": 12},
    }
    return types.SimpleNamespace(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\ncat dog,4\ndog,7\ncat,4\ncat cat,4\n")
    (tmp_path / "validation.csv").write_text("text,label\ndog dog,7\ncat dog,4\nbird,9\n")
    return tmp_path


def test_labels_are_indices_into_the_classes(folder, capsys):
    task = read_task(options(folder))
    assert (task.name, task.classes, task.pieces, task.test) == ("train", [4, 7, 9], False, None)
    assert task.train.labels.tolist() == [0, 1, 0, 0] and task.validation.labels.tolist() == [1, 0, 2]
    assert task.majority == pytest.approx(1 / 3) and task.overlap == 1
    assert set(task.inputs()) == {"train", "validation"}
    printed = capsys.readouterr().out
    assert f"1 of 3 sentences of {folder / 'validation.csv'} have a label that no training sentence has" in printed
    assert f"1 of 3 sentences of {folder / 'validation.csv'} are also in {folder / 'train.csv'}" in printed


def test_the_first_training_sentences_alone(folder):
    task = read_task(options(folder, max_train_samples=2))
    assert task.train.texts == ["cat dog", "dog"] and len(task.validation) == 3
    with pytest.raises(InputError, match="at least 2 classes"):
        (folder / "train.csv").write_text("text,label\ncat,4\ncat,4\ndog,7\n")
        read_task(options(folder, max_train_samples=2))


def test_a_validation_part_of_one_class_is_a_warning(folder, capsys):
    (folder / "validation.csv").write_text("text,label\ndog dog,7\ndog,7\n")
    read_task(options(folder))
    assert f"all 2 sentences of {folder / 'validation.csv'} have the label 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column 'text'"),
        ("text,label\n", "no sentences"),
        ("sentence,label\ncat,1\n", ":1: no column 'text'; the header is 'sentence,label'"),
        ("text\ncat\n", ":1: no column 'label'"),
        ("text,label\ncat dog\n", ":2: empty 'label'"),
        ("text,label\ncat,1\ncat, dog,1\n", ":3: 3 columns, the header has 2"),
        ("text,label\n  ,1\n", ":2: empty 'text'"),
        ("text,label\ncat,one\n", ":2: label 'one'"),
        ("text,label\ncat,-1\n", ":2: label '-1'"),
        ("text,label\ncat,1\ndog,1\n", "all labels are 1; a task needs at least 2 classes"),
        ('text,label\n"cat,1\n', "not a CSV file"),
    ],
)
@pytest.mark.parametrize("name", ["train", "validation"])
def test_malformed_files(folder, content, message, name):
    path = folder / f"{name}.csv"
    path.write_text(content)
    if name == "validation" and "at least 2" in message:
        return  # that is a warning, tested above
    with pytest.raises(InputError, match=str(path) + ".*" + message):
        read_task(options(folder))


def test_missing_files_are_named_by_flag(folder):
    with pytest.raises(InputError, match="--train_file: give the file, or --task_name"):
        read_task(options(folder, train_file=None))
    with pytest.raises(InputError, match="--validation_file: give the file"):
        read_task(options(folder, validation_file=None))
    with pytest.raises(InputError, match="--test_file: give the file"):
        read_task(options(folder), with_test=True)
    with pytest.raises(InputError, match="none.csv: no such file"):
        read_task(options(folder, train_file=folder / "none.csv"))


def test_labels_are_checked_against_the_names_beside_the_file(folder):
    names = folder / "train_labels.json"
    names.write_text(json.dumps({"names": {"4": "B4", "7": "B7", "9": "B9"}}))
    read_task(options(folder))
    names.write_text(json.dumps({"names": {"4": "B4", "7": "B7"}}))
    with pytest.raises(InputError, match="validation.csv: label 9 of sentence 3 is not one of the 2 in .*train_labels.json"):
        read_task(options(folder))
    names.write_text(json.dumps({}))
    with pytest.raises(InputError, match="has no 'names'"):
        read_task(options(folder))


def test_a_test_file_may_have_no_labels_or_others(folder, capsys):
    path = folder / "test.csv"
    path.write_text("text\ncat\nbird\n")
    task = read_task(options(folder, test_file=path), with_test=True)
    assert (
        task.test.texts == ["cat", "bird"]
        and task.test.labels is None
        and set(task.inputs()) == {"train", "validation", "test"}
    )
    path.write_text("text,label\ncat,4\nbird,5\n")
    assert read_task(options(folder, test_file=path), with_test=True).test.labels.tolist() == [0, -1]
    assert "1 of 2 sentences of" in capsys.readouterr().out
    assert read_task(options(folder, test_file=path)).test is None


def glue(folder, task="qnli", suffix=".tsv", **changes):
    files = {f"{split}_file": folder / f"{split}{suffix}" for split in ("train", "validation")}
    return options(folder, task_name=task, **{**files, **changes})


@pytest.fixture
def pairs(folder):
    (folder / "train.tsv").write_text(QNLI + 'Is "it?\tIt is.\tentailment\nWho?\tNo.\t1\nWhy?\tNo.\tnot_entailment\n')
    (folder / "validation.tsv").write_text("index\t" + QNLI + "0\tIs it?\tIt is.\t0\n1\tIs it?\tNo.\t1\n")
    return folder


def test_glue_files(pairs):
    task = read_task(glue(pairs))
    assert (task.name, task.classes, task.pieces, task.overlap) == ("qnli", [0, 1], True, 0)
    assert task.train.texts == ['Is "it?', "Who?", "Why?"] and task.train.pairs == ["It is.", "No.", "No."]
    assert task.train.labels.tolist() == [0, 1, 1] and task.validation.labels.tolist() == [0, 1]
    (pairs / "validation.tsv").write_text((pairs / "train.tsv").read_text())
    assert read_task(glue(pairs)).overlap == 3


def test_glue_of_the_hubs_kind(folder, capsys):
    import pyarrow
    import pyarrow.parquet

    for split, labels in (("train", [0, 1, 1]), ("validation", [1, 0, 1]), ("test", [-1, -1, -1])):
        columns = {"sentence": ["so good", "", "bad "], "label": labels, "idx": [0, 1, 2]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    flags = glue(folder, "sst2", ".parquet", test_file=folder / "test.parquet")
    task = read_task(flags, with_test=True)
    assert task.validation.labels.tolist() == [1, 0, 1] and task.test.labels is None and task.test.pairs is None
    assert task.train.texts == ["so good", "", "bad"]
    assert "1 of 3 rows of" in capsys.readouterr().out
    flags.validation_file = flags.test_file
    with pytest.raises(InputError, match="test.parquet: not labelled"):
        read_task(flags)
    (folder / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="train.parquet: can't be read"):
        read_task(flags)
    with pytest.raises(InputError, match="validation.parquet: no column 'question'; it has sentence, label, idx"):
        read_task(glue(folder, "qnli", ".parquet", train_file=folder / "validation.parquet"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("question\tlabel\nWho?\t1\n", "train.tsv:1: no column 'sentence'"),
        (QNLI + "Who?\tMe.\tmaybe\n", "train.tsv:2: label 'maybe'; it must be 0 or entailment, 1 or not_entailment"),
        (QNLI + "Who?\tMe.\tnot.\t1\n", "train.tsv:2: 4 columns, the header has 3"),
        (QNLI + "Who?\t\t1\n", "train.tsv:2: empty 'sentence'"),
        (QNLI + "Who?\tMe.\t1\n", "at least 2 classes"),
        ("question\tsentence\nWho?\tMe.\n", "train.tsv: no column 'label'; it has question, sentence"),
    ],
)
def test_malformed_glue_files(pairs, content, message):
    (pairs / "train.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_task(glue(pairs))


def test_columns_of_parquet_are_text(folder):
    import pyarrow
    from pyarrow import parquet

    kinds = {"int64": [1, 2], "double": [0.5, 1.5], "list<element: string>": [["a"], ["b"]], "binary": [b"a", b"b"]}
    kinds["struct<text: string>"] = [{"text": "a"}, {"text": "b"}]
    for kind, values in kinds.items():
        parquet.write_table(pyarrow.table({"sentence": values, "label": [0, 1]}), folder / "train.parquet")
        with pytest.raises(InputError, match=f"train.parquet: column 'sentence' is {kind}, not text"):
            read_task(glue(folder, "sst2", ".parquet"))
    texts = pyarrow.array(["a", "b"]).dictionary_encode()
    for name in ("train", "validation"):
        parquet.write_table(pyarrow.table({"sentence": texts, "label": [0, 1]}), folder / f"{name}.parquet")
    assert read_task(glue(folder, "sst2", ".parquet")).train.texts == ["a", "b"]


@pytest.mark.parametrize(
    "task, header, row, message",
    [
        ("qqp", "id question1 question2 is_duplicate", "7 a b 1", "rename its column 'is_duplicate' to 'label'.*--train_file"),
        ("mnli", "index premise hypothesis gold_label", "7 a b neutral", "rename its column 'gold_label' to 'label'"),
        ("qqp", "id question1 question2 x", "7 a b yes", "no column 'label'; it has id, question1, question2, x"),
        ("sst2", "sentence label", "a 1 ", "3 columns, the header has 2; remove the tabs that do not separate two columns"),
    ],
)
def test_columns_of_glues_own_files(folder, task, header, row, message):
    (folder / "train.tsv").write_text("\n".join(line.replace(" ", "\t") for line in (header, row, row)) + "\n")
    with pytest.raises(InputError, match=f"train.tsv.*{message}"):
        read_task(glue(folder, task))


def test_glue_by_name_without_the_hub_fails_at_once(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for task in GLUE:
        columns = ",".join((*GLUE[task][0], "label"))
        with pytest.raises(InputError, match=f"--task_name {task}: .*HF_HUB_OFFLINE=0.*--train_file.* columns {columns} "):
            read_task(options(folder, task_name=task, train_file=None, validation_file=None))
    with pytest.raises(InputError, match="--task_name stsb: is none of .*cola, mnli"):
        read_task(options(folder, task_name="stsb"))


def test_glue_from_the_hubs_cache(folder, monkeypatch):
    """The files are where snapshot_download says."""
    import pyarrow
    import pyarrow.parquet

    (folder / "mnli").mkdir()
    for split in ("train", "validation_matched", "validation_mismatched", "test_matched"):
        columns = {"premise": [split, "b"], "hypothesis": ["c", "d"], "label": [0, 2]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "mnli" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    task = read_task(options(folder, task_name="mnli", train_file=None, validation_file=None), with_test=True)
    assert [part.texts[0] for part in task.parts()] == ["train", "validation_matched", "test_matched"]


@pytest.fixture
def natural(tmp_path):
    """A model folder with a tokenizer of word pieces, and its configuration of 9 positions."""
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "is", "it", "who", "?", ".", "##s", "no"])
    save_tokenizer(tmp_path / "model", build_tokenizer(vocabulary, True, 512), vocabulary)
    config = ModelConfig(vocabulary.size, 8, 1, 1, 8, max_position_embeddings=9)
    write_json(tmp_path / "model" / "config.json", config.to_transformers())
    return tmp_path / "model", config, vocabulary


def test_pairs_as_pieces(pairs, natural, capsys):
    (pairs / "train.tsv").write_text(QNLI + "Is its?\tWho.\t0\nIs is is is is?\tno no.\t1\nWhy?\tNo.\t1\n")
    model, config, vocabulary = natural
    contexts = encode_task(read_task(glue(pairs)), model, config, glue(pairs))[0]
    rows = [
        [vocabulary.words[token] for token in row[:length]]
        for row, length in zip(contexts.input_ids, contexts.lengths, strict=True)
    ]
    assert rows == [
        "[CLS] is it ##s ? [SEP] who . [SEP]".split(),
        "[CLS] is is is [SEP] no no . [SEP]".split(),
        "[CLS] [UNK] ? [SEP] no . [SEP]".split(),
    ]
    printed = capsys.readouterr().out
    assert "1 of 3 rows of" in printed and "longer than 9 tokens and were cut" in printed
    assert f"1 of 25 tokens of {pairs / 'train.tsv'} are [UNK]" in printed
    special = {vocabulary.cls_id, vocabulary.sep_id}
    assert [
        contexts.input_ids[i, t] for i, t in zip(contexts.sentence, contexts.position, strict=True)
    ] == contexts.label.tolist()
    assert len(contexts.label) == sum(token not in special for row in contexts.input_ids for token in row[row > 0])


def test_words_are_the_strict_way(folder, pairs, natural):
    model, config, _ = natural
    with pytest.raises(InputError, match="--tokenization words: is for single sentences"):
        read_task(glue(pairs, tokenization="words"))
    with pytest.raises(InputError, match="cat"):
        encode_task(read_task(options(folder)), model, config, options(folder))
    flags = options(folder, tokenization="pieces")
    contexts = encode_task(read_task(flags), model, config, flags)[0]
    assert contexts.lengths.tolist() == [4, 3, 3, 4] and np.count_nonzero(contexts.input_ids == 1) == 6
