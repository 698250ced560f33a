"""The vocabulary file, words as ids, and the tokenizer: built, saved, found again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pcfg.common.files import InputError, read_json, write_json
from pretraining.data.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    check_single_tokens,
    find_vocabulary,
    resolve_tokenizer,
    save_tokenizer,
)
from tests.bert_tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["cat", "dog", "##s", "[unused0]", "runs", "the"]


@pytest.fixture
def vocabulary():
    return Vocabulary([*SPECIAL_TOKENS, *WORDS])


def save(folder, vocabulary, name, do_lower_case=True):
    tokenizer = build_tokenizer(vocabulary, do_lower_case, 12)
    tokenizer.name_or_path = name
    save_tokenizer(folder, tokenizer, vocabulary)
    return tokenizer


def test_write_and_read_give_the_same_vocabulary(tmp_path, vocabulary):
    vocabulary.write(tmp_path / "vocab.txt")
    read = Vocabulary.read(tmp_path / "vocab.txt")
    assert (read.words, read.sha256, read.ids) == (vocabulary.words, vocabulary.sha256, vocabulary.ids)
    assert read.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert read.size == 11


def test_windows_line_ends_and_unusual_line_separators_are_read(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*SPECIAL_TOKENS, "caf\u00e9"]).encode())
    assert Vocabulary.read(path).words[-1] == "caf\u00e9"


def test_ids_of_special_tokens_need_not_be_the_first():
    vocabulary = Vocabulary(["[PAD]", "cat", "[MASK]", "[SEP]", "[CLS]", "[UNK]"])
    assert (vocabulary.mask_id, vocabulary.sep_id, vocabulary.cls_id, vocabulary.unk_id) == (2, 3, 4, 5)
    assert vocabulary.ordinary_ids().tolist() == [1]


def test_ordinary_ids_leave_out_pieces_and_reserved_entries(vocabulary):
    assert [vocabulary.words[i] for i in vocabulary.ordinary_ids()] == ["cat", "dog", "runs", "the"]


@pytest.mark.parametrize("entries", [["cat", "", "dog", "fish"], ["cat", "dog", "dog", "fish"]])
def test_the_advice_for_a_blank_or_repeated_line_keeps_the_ids(tmp_path, entries):
    path = tmp_path / "vocab.txt"
    lines = [*SPECIAL_TOKENS, *entries]
    path.write_text("\n".join(lines) + "\n")
    ids = {line: number for number, line in enumerate(lines)}  # as tokenizers read the file: the last of equal lines counts
    with pytest.raises(InputError) as caught:
        Vocabulary.read(path)
    number, spare = re.search(r"vocab.txt:(\d+): .*; write (\S+) in its place", str(caught.value)).groups()
    lines[int(number) - 1] = spare
    path.write_text("\n".join(lines) + "\n")
    vocabulary = Vocabulary.read(path)
    assert {word: vocabulary.ids[word] for word in ("cat", "dog", "fish")} == {
        word: ids[word] for word in ("cat", "dog", "fish")
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "vocab.txt: empty"),
        (
            "\n".join([*SPECIAL_TOKENS, "cat", "dog", "cat"]).encode(),
            r"vocab.txt:6: entry 'cat' is on line 8 .* \[unused0\] in its place",
        ),
        ("\n".join([*SPECIAL_TOKENS[:4], "cat"]).encode(), r"special token \[MASK\] is missing"),
        ("\n".join(["cat", *SPECIAL_TOKENS]).encode(), r"vocab.txt:1: the first entry is 'cat'"),
        ("\n".join([*SPECIAL_TOKENS, "", "cat"]).encode(), r"vocab.txt:6: entry '' is empty .* \[unused0\] in its place"),
        ("\n".join([*SPECIAL_TOKENS, "[unused0]", "", "cat"]).encode(), r"vocab.txt:7: .* \[unused1\] in its place"),
        ("\n".join(["\ufeff[PAD]", *SPECIAL_TOKENS[1:], "cat"]).encode(), "vocab.txt:1: starts with a byte order mark"),
        ("\n".join([*SPECIAL_TOKENS, "a cat"]).encode(), r"vocab.txt:6: entry 'a cat' .* white space"),
        ("\n".join(SPECIAL_TOKENS).encode(), "no words but special tokens"),
        ("\n".join(SPECIAL_TOKENS).encode() + b"\ncat\n\xff\n", r"vocab.txt:7: not UTF-8"),
    ],
)
def test_broken_vocabularies_are_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Vocabulary.read(path)


def test_a_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.txt: no such file"):
        Vocabulary.read(tmp_path / "none.txt")
    with pytest.raises(InputError, match="a folder"):
        Vocabulary.read(tmp_path)


def test_encode_agrees_with_word_by_word_lookup(vocabulary):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "runs", "the"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 7))) for _ in range(10)]
    tokens, lengths = vocabulary.encode(texts, "here")
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens.shape[1] == lengths.max()
    flat, lengths_of_bytes = vocabulary.encode_text("\n\n".join(texts).encode(), "here")
    assert flat.dtype == np.int32 and np.array_equal(lengths_of_bytes, lengths)
    assert flat.tolist() == [vocabulary.ids[word] for text in texts for word in text.split()]
    for row, length, text in zip(tokens, lengths, texts, strict=True):
        expected = [vocabulary.ids[word] for word in text.split()]
        assert row.tolist() == expected + [vocabulary.pad_id] * (tokens.shape[1] - len(expected))
        assert length == len(expected)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cat", "the bird runs"], "here.txt: sentence 2: word 'bird' is not in the vocabulary"),
        (["cat", "cat", "the Dog"], "here.txt: sentence 3: word 'Dog' .* 'dog' is; write the text in lower case"),
        (["[MASK] cat"], r"sentence 1: word '\[MASK\]' is reserved"),
        (["cat ##s"], "word '##s' is reserved"),
        (["cat", " "], "sentence 2: no words"),
    ],
)
def test_encode_names_sentence_and_word(vocabulary, texts, message):
    with pytest.raises(InputError, match=message):
        vocabulary.encode(texts, "here.txt")


def test_encode_text_counts_the_sentences_before(vocabulary):
    with pytest.raises(InputError, match=r"here.txt: sentence 12: word '\[SEP\]' is reserved"):
        vocabulary.encode_text(b"cat\n\nthe [SEP] dog\nbird\n", "here.txt", first_sentence=10)
    with pytest.raises(InputError, match=r"here.txt:2: not UTF-8"):
        vocabulary.encode_text(b"cat\n\xff\n", "here.txt")


def test_encode_no_sentences(vocabulary):
    tokens, lengths = vocabulary.encode([], "here")
    assert tokens.shape == (0, 0) and lengths.shape == (0,)


def test_a_bare_vocabulary_name_is_looked_up_beside_the_data_first(tmp_path, vocabulary, monkeypatch, capsys):
    beside, working = tmp_path / "data", tmp_path / "working"
    for folder in (beside, working):
        folder.mkdir()
        vocabulary.write(folder / "vocab.txt")
    monkeypatch.chdir(working)
    assert find_vocabulary("vocab.txt", [tmp_path / "none", beside]) == beside / "vocab.txt"
    assert f"{beside / 'vocab.txt'}, 11 entries" in capsys.readouterr().out
    assert find_vocabulary("vocab.txt", [tmp_path / "none"]) == Path("vocab.txt")
    assert find_vocabulary("./vocab.txt", [beside]) == Path("vocab.txt")  # a folder is named: taken as it stands
    with pytest.raises(InputError, match=f"other.txt: no such file; looked for {beside / 'other.txt'}, other.txt"):
        find_vocabulary("other.txt", [beside])


def test_the_tokenizer_has_the_vocabulary_and_survives_saving(tmp_path, vocabulary):
    from transformers import AutoTokenizer

    tokenizer = save(tmp_path / "tok", vocabulary, "some-name")
    assert len(tokenizer) == vocabulary.size
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    for word in ("cat", "dog", "runs", "the"):
        expected = [vocabulary.cls_id, vocabulary.ids[word], vocabulary.sep_id]
        assert tokenizer(word)["input_ids"] == reloaded(word)["input_ids"] == expected
    assert reloaded.get_vocab() == vocabulary.ids
    assert reloaded.mask_token_id == vocabulary.mask_id
    assert reloaded.model_max_length == 12
    assert Vocabulary.read(tmp_path / "tok" / "vocab.txt").sha256 == vocabulary.sha256
    assert Vocabulary.from_tokenizer(reloaded).sha256 == vocabulary.sha256
    assert read_json(tmp_path / "tok" / "tokenizer_config.json")["name_or_path"] == "some-name"


def test_words_that_are_not_one_token_are_named():
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "cat", "Cat", "o'clock", "##s", "caf\u00e9"])
    lower, cased = (build_tokenizer(vocabulary, flag, 12) for flag in (True, False))
    for word in ("Cat", "o'clock", "caf\u00e9", "bird", "cats"):
        with pytest.raises(InputError, match=rf"word {word!r} is not one token.* of it \(1 such words\)"):
            check_single_tokens(lower, ["cat", word])
    check_single_tokens(cased, ["cat", "Cat", "caf\u00e9"])
    with pytest.raises(InputError, match="word 'cats' is not one token.* makes cat ##s of it"):
        check_single_tokens(lower, ["cat", "cats"])


def test_saving_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, vocabulary):
    tokenizer = build_tokenizer(vocabulary, True, 12)
    with pytest.raises(InputError, match="11 entries that are not the 6"):
        save_tokenizer(tmp_path / "tok", tokenizer, Vocabulary([*SPECIAL_TOKENS, "cat"]))
    assert not (tmp_path / "tok").exists()


def test_resolve_order(tmp_path, vocabulary, monkeypatch, capsys):
    samples, model, local = tmp_path / "samples", tmp_path / "model", tmp_path / "local"
    other = Vocabulary([*SPECIAL_TOKENS, "other"])
    third = Vocabulary([*SPECIAL_TOKENS, "third", "fourth"])
    save(samples / "bert", vocabulary, "bert")
    save(model, other, "bert")  # a model folder: the files are in the folder itself
    save(local / "bert", third, "bert")
    monkeypatch.chdir(local)

    found = resolve_tokenizer("bert", [samples])
    assert (len(found), found.name_or_path) == (vocabulary.size, "bert")
    assert f"{samples / 'bert'}, {vocabulary.size} entries" in capsys.readouterr().out
    assert len(resolve_tokenizer("bert", [model])) == other.size
    assert len(resolve_tokenizer("bert", [model, samples])) == other.size
    assert len(resolve_tokenizer("bert", [tmp_path / "none"])) == third.size
    assert len(resolve_tokenizer("./bert", [model])) == third.size  # a path is not the model folder's name
    assert len(resolve_tokenizer(str(samples / "bert"), [model])) == vocabulary.size


def test_a_model_folder_keeps_the_name_of_its_tokenizer(tmp_path, vocabulary):
    save(tmp_path / "samples" / "bert", vocabulary, "bert")
    found = resolve_tokenizer(str(tmp_path / "samples" / "bert"), [])
    save_tokenizer(tmp_path / "model", found, vocabulary)
    assert len(resolve_tokenizer("bert", [tmp_path / "model"])) == vocabulary.size
    with pytest.raises(InputError, match="tokenizer roberta: not found"):
        resolve_tokenizer("roberta", [tmp_path / "model"])
    write_json(tmp_path / "model" / "args.json", {"arguments": {"tokenizer_name": "roberta"}})
    assert len(resolve_tokenizer("roberta", [tmp_path / "model"])) == vocabulary.size


def test_a_damaged_tokenizer_is_refused(tmp_path, vocabulary):
    save(tmp_path / "a", vocabulary, "a")
    Vocabulary([*SPECIAL_TOKENS, "cat"]).write(tmp_path / "a" / "vocab.txt")
    with pytest.raises(InputError, match="entries that are not the 6 of its vocabulary"):
        resolve_tokenizer("a", [tmp_path])
    save(tmp_path / "b", vocabulary, "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "vocab.txt").unlink()
    with pytest.raises(InputError, match="b: no words but special tokens"):
        resolve_tokenizer("b", [tmp_path])


def test_a_folder_without_a_tokenizer_is_named(tmp_path, vocabulary):
    vocabulary.write(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="the folder has no tokenizer.json"):
        resolve_tokenizer(str(tmp_path), [])


def test_a_tokenizer_configuration_of_another_shape_is_refused(tmp_path, vocabulary):
    save_tokenizer(tmp_path, build_tokenizer(vocabulary, True, 12), vocabulary)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="can't be loaded"):
        resolve_tokenizer(str(tmp_path), [])


def test_a_damaged_tokenizer_json_is_refused(tmp_path, vocabulary):
    save(tmp_path / "a", vocabulary, "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="a: its tokenizer can't be loaded"):
        resolve_tokenizer("a", [tmp_path])


@pytest.mark.parametrize("transformers_first", [False, True])
def test_a_hub_name_fails_at_once(tmp_path, transformers_first):
    """In a process of its own, since the hub's switch is read once; transformers may have been imported before ours."""
    code = """
import time
from transformers import AutoTokenizer
from pcfg.common.files import InputError
from pretraining.data.vocabulary import resolve_tokenizer
start = time.monotonic()
try:
    resolve_tokenizer("bert-large-uncased", ["beside"])
except InputError as error:
    print(f"{time.monotonic() - start:.3f} {error}")
"""
    if not transformers_first:
        transformers_line = "from transformers import AutoTokenizer\n"
        code = code.replace(transformers_line, "").replace("start =", f"{transformers_line}start =")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    seconds, message = result.stdout.split(" ", 1)
    assert float(seconds) < 1
    for place in ("beside/bert-large-uncased", "beside,", " bert-large-uncased,", "HF_HUB_OFFLINE=0"):
        assert place in message
