"""Pieces are injective and hold no white space; the tokenizer leaves them alone and finds them in English."""

import inspect
import json
import re
import statistics
import tarfile
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pcfg.common.files import InputError
from pretraining.data.vocabulary import SPECIAL_TOKENS, TOKENIZER_FILES, Vocabulary, resolve_tokenizer
from pretraining.data.wordpiece import write_tokenizer
from pretraining.sources.opt.escaped_tokens import (
    CLOSE,
    JOINED,
    LINE_BREAKS,
    OPEN,
    SPACED,
    build_tokenizer,
    escape,
    token_bytes,
    why_excluded,
)

PLAIN = [
    "‿The",
    "Ġcat",
    "‿s",
    "‿.",
    "‿'s",
    "‿'t",
    "‿don",
    "Ġ3",
    "‿rd",
    "Ġ(",
    "Ġ",
    "Ġthe",
    "‿⟨E280⟩",
    "‿caf⟨C3⟩",
    "Ġ⟨C4A0⟩a",
    "‿the",
]


@pytest.fixture(scope="module")
def plain():
    return build_tokenizer(Vocabulary([*SPECIAL_TOKENS, *PLAIN]))


def unescape(piece: str) -> bytes:
    """The bytes of a piece, or a ValueError. That `escape` has an inverse proves that distinct tokens have distinct pieces."""
    parts = re.fullmatch(f"[{SPACED}{JOINED}](?:[^{SPACED}{JOINED}{OPEN}{CLOSE}]|{OPEN}(?:[0-9A-F]{{2}})+{CLOSE})*", piece)
    if parts is None:
        raise ValueError(f"{piece!r} is no piece of a token")
    body = re.split(f"{OPEN}([0-9A-F]+){CLOSE}", piece[1:])  # text, hexadecimal, text, ...
    content = b"".join(bytes.fromhex(part) if number % 2 else part.encode() for number, part in enumerate(body))
    return b" " * (piece[0] == SPACED) + content


def test_all_bytes_and_random_ones_have_distinct_pieces():
    rng = np.random.default_rng(0)
    parts = [bytes([byte]) for byte in range(256)] + [
        text.encode() for text in (*"Ġ‿⟨⟩é中\u00ad\u2028\u00a0🙂\u200b", " ", "#", "[")
    ]
    tokens = {bytes([byte]) for byte in range(256)} | {b" " + bytes([byte]) for byte in range(256)}
    tokens |= {b"".join(parts[index] for index in rng.integers(len(parts), size=rng.integers(1, 7))) for _ in range(5000)}
    pieces = {token: escape(token) for token in tokens}
    assert len(set(pieces.values())) == len(tokens) > 4_000
    for token, piece in pieces.items():
        assert unescape(piece) == token
        assert piece.split() == [piece] and piece.isprintable() and len(piece.splitlines()) == 1
        assert piece[0] in "Ġ‿" and not set(piece[1:]) & set("Ġ‿")


@pytest.mark.parametrize("wrong", ["", "cat", "Ġ⟨E2", "Ġ⟨e2⟩", "Ġ⟨E⟩", "Ġa‿", "‿⟨⟩"])
def test_what_is_no_piece(wrong):
    with pytest.raises(ValueError, match="no piece"):
        unescape(wrong)


def test_what_is_excluded():
    assert all(why_excluded(f" a{character}".encode()) == "line break" for character in LINE_BREAKS)
    assert all(len(f"a{character}b".splitlines()) == 2 for character in LINE_BREAKS)
    assert [chr(code) for code in range(0x110000) if len(f"a{chr(code)}b".splitlines()) == 2] == sorted(LINE_BREAKS)
    assert why_excluded(b"") == "empty" and why_excluded(b"x[MASK]") == "holds a special token"
    assert why_excluded(b" the") is why_excluded(b"\xe2\x80") is why_excluded(b"\xa8") is why_excluded(b" ") is None


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The cats.", "‿The Ġcat ‿s ‿."),
        (" the cat's", "Ġthe Ġcat ‿'s"),
        ("the\n\n  cat", "‿the Ġcat"),
        ("don't", "‿don ‿'t"),
        ("The 3rd (cat) dog.", "‿The Ġ3 ‿rd Ġ( [UNK] [UNK] [UNK] ‿."),
        ("", ""),
        (" \n", ""),
        (" ".join(PLAIN), " ".join(PLAIN)),
        ("\n".join(PLAIN), " ".join(PLAIN)),
        ("The [MASK] cat[SEP]", "‿The [MASK] Ġcat [SEP]"),
        ("Ġcat ‿s [MASK] ‿s", "Ġcat ‿s [MASK] ‿s"),
    ],
)
def test_text_and_pieces(plain, text, pieces):
    assert plain.encode(text, add_special_tokens=False).tokens == pieces.split()


def test_a_text_comes_back(plain):
    text = " the cat's 3rd."
    assert plain.decode(plain.encode(text).ids) == text


def test_a_cut_that_would_split_a_piece_is_not_made():
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "Ġa.b", "Ġx", "‿1", "‿.", "‿,"])
    tokenizer = build_tokenizer(vocabulary)
    assert not vocabulary.changed_by(tokenizer)
    assert tokenizer.encode(" x1, a.b, dog1.", add_special_tokens=False).tokens == "Ġx ‿1 ‿, Ġa.b ‿, [UNK] ‿.".split()
    with pytest.raises(InputError, match="no piece that stays one token"):
        build_tokenizer(Vocabulary([*SPECIAL_TOKENS, "‿a[SEP]"]))


def test_english_gets_the_pieces_of_the_models_own_tokenizer(english, make_tokenizer):
    """Of the words (as GPT-2 cuts them) whose tokens are all kept, at least 96% get the same pieces; the figure is printed."""
    theirs = make_tokenizer(english, 3000)
    tokens = token_bytes(theirs)
    counts = Counter(index for encoded in theirs(english)["input_ids"] for index in encoded)
    kept = [index for index, _ in counts.most_common() if index in tokens and why_excluded(tokens[index]) is None][:1500]
    ours = build_tokenizer(Vocabulary([*SPECIAL_TOKENS, *(escape(tokens[index]) for index in kept)]))
    kept, same, known = set(kept), 0, 0
    for module in (inspect, statistics, tarfile):
        documentation = [inspect.getdoc(value) for value in vars(module).values() if inspect.isfunction(value)]
        for text in (" ".join(documented.split()) for documented in documentation if documented):
            for word, _ in theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
                encoded = [token.id for token in theirs.backend_tokenizer.model.tokenize(word)]
                if set(encoded) <= kept:
                    known += 1
                    plain = b"".join(tokens[index] for index in encoded).decode()
                    expected = [escape(tokens[index]) for index in encoded]
                    same += ours.encode(plain, add_special_tokens=False).tokens == expected
    print(f"{same / known:.2%} of {known:,} words get the pieces of the model's own tokenizer")
    assert known > 4_000 and same / known > 0.96


def test_the_bytes_of_tokens_of_both_kinds(make_tokenizer):
    byte_level = make_tokenizer(["a cat's café"] * 9, 300)
    byte_level.add_tokens(["Ġnew"])
    tokens = token_bytes(byte_level)
    assert {bytes([byte]) for byte in range(256)} | {" café".encode(), "Ġnew".encode()} <= set(tokens.values())
    assert not {byte_level.bos_token_id, byte_level.pad_token_id} & set(tokens)
    entries = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁the": 3, "cat": 4, "▁": 5}
    sentencepiece = Tokenizer(models.BPE(entries, [], unk_token="<unk>", byte_fallback=True))
    sentencepiece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs = PreTrainedTokenizerFast(tokenizer_object=sentencepiece, unk_token="<unk>", bos_token="<s>")
    assert token_bytes(theirs) == {2: b"\n", 3: b" the", 4: b"cat", 5: b" "}
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="neither byte-level BPE nor"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=other, unk_token="[UNK]"))


def test_the_saved_files_are_found_and_give_the_same(plain, tmp_path):
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *PLAIN])
    (tmp_path / "opt").mkdir()
    write_tokenizer(tmp_path / "opt", plain, vocabulary, 24, "opt")
    assert sorted(path.name for path in (tmp_path / "opt").iterdir()) == sorted(TOKENIZER_FILES)
    loaded = resolve_tokenizer("opt", [tmp_path])
    assert loaded.model_max_length == 24 and loaded.mask_token == "[MASK]" and loaded.pad_token_id == 0
    for text in ("The cats.", " ".join(PLAIN), " the\ncat's 3rd [MASK]"):
        assert loaded(text)["input_ids"] == plain.encode(text).ids
    pair = loaded("The cats", "The")["input_ids"]
    assert loaded.convert_ids_to_tokens(pair) == "[CLS] ‿The Ġcat ‿s [SEP] ‿The [SEP]".split()
    assert json.loads((tmp_path / "opt" / "tokenizer_config.json").read_text())["name_or_path"] == "opt"
