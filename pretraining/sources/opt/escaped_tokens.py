"""A language model's tokens as words of a text, and the tokenizer that finds the same words in English.

The tokenizer of a model may cut its sampled text differently, so a line of the data holds the sampled tokens. Each token is one
word, a piece; pieces are separated by single spaces. The piece of a token's bytes is a mark and a body. The mark is Ġ (U+0120)
if the bytes begin with a space, which the mark replaces, else ‿ (U+203F): joined to the text before. The body is the other
bytes as UTF-8. Hexadecimal bytes between ⟨ and ⟩ replace white space, unprintable characters, bytes that form no whole
character, and the four characters Ġ ‿ ⟨ ⟩ themselves. Two different tokens have different pieces.

    " the" -> Ġthe      "s" -> ‿s      " \\n" -> Ġ⟨0A⟩      b"\\xe2\\x80" -> ‿⟨E280⟩

The tokenizer does not change pieces, and marks the words of other text in the same way: "The cats." -> ‿The Ġcats ‿. if these
are entries of the vocabulary, else the longest entries from the left (Ġcat ‿s), else [UNK]. Runs of white space count as one
space. Words are first cut where GPT-2's tokenizer cuts them (Radford et al. 2019): between letters, digits and others, and
before 's 't 're 've 'm 'll 'd.
"""

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from pcfg.common.files import InputError
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.data.wordpiece import UNK, add_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACED = "Ġ"
JOINED = "‿"
OPEN = "⟨"
CLOSE = "⟩"
_RESERVED = (" ", SPACED, JOINED, OPEN, CLOSE)  # a space is printable
LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts
LONGEST_WORD = 1_000  # longer ones are [UNK]: the time of WordPiece's search grows with the square of a word's length


def escape(token: bytes) -> str:
    """The piece of a token's bytes.

    >>> escape(b" the"), escape(b"s"), escape(b" \\n"), escape(bytes.fromhex("e280"))
    ('Ġthe', '‿s', 'Ġ⟨0A⟩', '‿⟨E280⟩')
    """
    piece = SPACED if token.startswith(b" ") else JOINED
    # A byte that belongs to no whole character becomes a lone surrogate, U+DC80 to U+DCFF, which is not printable.
    text = token.removeprefix(b" ").decode("utf-8", "surrogateescape")
    for is_plain, group in itertools.groupby(text, lambda character: character.isprintable() and character not in _RESERVED):
        characters = "".join(group)
        piece += characters if is_plain else f"{OPEN}{characters.encode('utf-8', 'surrogateescape').hex().upper()}{CLOSE}"
    return piece


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """The bytes of each token of a tokenizer, by id, without special tokens.

    Two kinds are supported: byte-level BPE (GPT-2, OPT), whose entries are bytes in GPT-2's table, and sentencepiece (Llama),
    where ▁ is a space and <0xNN> a byte.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = _types(description["decoder"]) | _types(description["pre_tokenizer"])
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise InputError(
            f"--model-name {tokenizer.name_or_path}: its tokenizer is neither byte-level BPE nor sentencepiece, so "
            "the bytes of its tokens are not known; give another model"
        )
    table = {character: byte for byte, character in bytes_to_unicode().items()}

    def decode(entry: str) -> bytes:
        if "ByteLevel" in kinds:
            return bytes(table[character] for character in entry)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", entry)
        return bytes.fromhex(entry[3:5]) if is_byte else entry.replace("▁", " ").encode()

    added = {int(index): token for index, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    entries = ((entry, index) for entry, index in tokenizer.get_vocab().items() if index not in special)
    return {index: entry.encode() if index in added else decode(entry) for entry, index in entries}


def _types(description: Any) -> set[str | None]:
    """All values of "type" in a tokenizer's JSON."""
    if isinstance(description, dict):
        return {description.get("type")}.union(*map(_types, description.values()))
    return set().union(*map(_types, description)) if isinstance(description, list) else set()


def why_excluded(token: bytes) -> str | None:
    """The reason why a token can't be a word of the data; None if it can."""
    if not token:
        return "empty"
    # An incomplete character can't end a line: its piece is hexadecimal.
    if any(character in LINE_BREAKS for character in token.decode("utf-8", "ignore")):
        return "line break"
    # The tokenizer recognises special tokens anywhere in a text.
    return "holds a special token" if any(special in escape(token) for special in SPECIAL_TOKENS) else None


# Where words are cut, as patterns of no width (Oniguruma): after letters, after digits, after others. Never after a mark,
# next to or within an escape, or in a contraction.
_CUTS = (
    rf"(?<=[\p{{L}}&&[^{SPACED}]])(?=[^\s\p{{L}}{OPEN}])(?![0-9A-F]*{CLOSE})",
    rf"(?<=\p{{N}})(?=[^\s\p{{N}}{OPEN}])(?![0-9A-F]*{CLOSE})",
    rf"(?<=[^\s\p{{L}}\p{{N}}{JOINED}{OPEN}{CLOSE}])(?=[\p{{L}}\p{{N}}])"
    rf"(?!(?<=[\p{{L}}\p{{N}}{JOINED}]')(?:s|t|re|ve|m|ll|d))",
)


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a vocabulary of special tokens and pieces, by the library `tokenizers` alone.

    A kind of cut that would split a piece of the vocabulary is left out; this occurs only with models unlike GPT-2.
    """
    pieces = [word for word in vocabulary.words if word not in SPECIAL_TOKENS]
    cuts = [normalizers.Replace(Regex(cut), f" {JOINED}") for cut in _CUTS]
    tokenizer = Tokenizer(
        WordPiece(vocabulary.ids, unk_token=UNK, continuing_subword_prefix=JOINED, max_input_chars_per_word=LONGEST_WORD)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            # No space precedes the first word, unless it is a piece or the text begins with white space.
            normalizers.Prepend(JOINED),
            normalizers.Replace(Regex(rf"\A{JOINED}(?=[\s{SPACED}{JOINED}]|\z)"), ""),
            normalizers.Replace(Regex(rf"\s+(?=[^\s{SPACED}{JOINED}])"), f" {SPACED}"),
            *(cut for cut in cuts if all(cut.normalize_str(piece) == piece for piece in pieces)),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(JOINED, ""), decoders.Replace(SPACED, " "), decoders.Fuse()])
    add_special_tokens(tokenizer, vocabulary)
    if changed := vocabulary.changed_by(tokenizer):
        raise InputError(f"vocabulary: {sorted(changed)[0]!r} is no piece that stays one token; generate the text again")
    return tokenizer
