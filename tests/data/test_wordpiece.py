"""The tokenizer's files and the check of words, against transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretraining.data.vocabulary import (
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    Vocabulary,
    resolve_tokenizer,
    save_tokenizer,
)
from pretraining.data.wordpiece import wordpiece, write_tokenizer
from tests.bert_tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [
    "cat",
    "Cat",
    "##s",
    "o'clock",
    "caf\u00e9",
    "[unused0]",
    "\u4e2d\u6587",
    "\u4e2d",
    "soft\u00adhyphen",
    "x" * 120,
    "\u0130",
]
VOCABULARIES = [
    Vocabulary([*SPECIAL_TOKENS, *WORDS]),
    Vocabulary(["[PAD]", "cat", "[MASK]", "[SEP]", "dog", "[CLS]", "[UNK]", "##s"]),
]


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_files_are_those_of_transformers(tmp_path, vocabulary, do_lower_case):
    theirs = build_tokenizer(vocabulary, do_lower_case, 17)
    theirs.name_or_path = "n\u00e4me"
    save_tokenizer(tmp_path / "theirs", theirs, vocabulary)
    (tmp_path / "ours").mkdir()
    write_tokenizer(tmp_path / "ours", wordpiece(vocabulary, do_lower_case), vocabulary, 17, "n\u00e4me", do_lower_case)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_the_files_are_found_and_loaded(tmp_path):
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert", wordpiece(VOCABULARIES[1], True), VOCABULARIES[1], 17, "bert", True)
    tokenizer = resolve_tokenizer("bert", [tmp_path])
    assert tokenizer("Cat dogs")["input_ids"] == [5, 1, 4, 7, 3]
    assert tokenizer.model_max_length == 17 and tokenizer.mask_token_id == 2


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_changed_words_are_those_of_transformers(vocabulary, do_lower_case):
    words = [vocabulary.words[index] for index in vocabulary.ordinary_ids()]
    encoded = build_tokenizer(vocabulary, do_lower_case, 17)(words, add_special_tokens=False)["input_ids"]
    expected = [word for word, pieces in zip(words, encoded, strict=True) if pieces != [vocabulary.ids[word]]]
    assert vocabulary.changed_by(wordpiece(vocabulary, do_lower_case)) == frozenset(expected)
    assert "cat" not in expected and ("Cat" not in words or ("Cat" in expected) == do_lower_case)


def test_generate_samples_does_not_import_transformers():
    code = "import sys, generate_samples; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
