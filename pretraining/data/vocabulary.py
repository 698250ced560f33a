"""The vocabulary file (`vocab.txt`, one entry per line, the id is the line number from 0) and its tokenizer.

One word of the data is one token: a word that is unknown, or that the tokenizer would split or change, is an error.

`transformers` takes seconds to import, and many users of this module need nothing but `Vocabulary`, so it is imported
inside the functions that load tokenizers. The hub is off unless the user sets HF_HUB_OFFLINE=0: without a network
huggingface_hub retries for 46 s before it gives up. The variable must be set before huggingface_hub is imported, hence the
line below, and `local_files_only` for programs that imported it first.
"""

import codecs
import functools
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from pcfg.common.files import AnyPath, InputError, atomic_open, read_json, write_json
from pcfg.common.text import decode_block
from pcfg.common.words import WordIndex, padded

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NOT_A_WORD = re.compile(r"##.*|\[unused\d+\]", re.DOTALL)
VOCABULARY_FILE = "vocab.txt"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", VOCABULARY_FILE)


def _is_ordinary(word: str) -> bool:
    return word not in SPECIAL_TOKENS and not NOT_A_WORD.fullmatch(word)


class Vocabulary:
    """The entries of a vocabulary and their ids.

    Args:
        words: the entries, distinct and without white space; the position is the id. [PAD] comes first, the other special
            tokens anywhere.
        source: the file, for messages.

    >>> vocabulary = Vocabulary([*SPECIAL_TOKENS, "cat", "##s", "dog"])
    >>> vocabulary.size, vocabulary.mask_id, vocabulary.ordinary_ids().tolist()
    (8, 4, [5, 7])
    >>> tokens, lengths = vocabulary.encode(["dog", "cat dog"], "example")
    >>> tokens.tolist(), lengths.tolist()
    ([[7, 0], [5, 7]], [1, 2])
    """

    def __init__(self, words: list[str], source: object = "vocabulary"):
        self.words = list(words)  # special tokens included
        self.ids = {word: index for index, word in enumerate(self.words)}
        self._check(source)
        self.size = len(self.words)
        self.special_ids = np.array([self.ids[token] for token in SPECIAL_TOKENS])
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids.tolist()
        self.sha256 = hashlib.sha256("\n".join(self.words).encode()).hexdigest()
        self._word_ids = np.flatnonzero([_is_ordinary(word) for word in self.words]).astype(np.int32)
        if not len(self._word_ids):
            raise InputError(f"{source}: no words but special tokens; add the words of the data, one per line")

    def _check(self, source: object) -> None:
        if not self.words:
            raise InputError(f"{source}: empty; one entry per line is needed, first {SPECIAL_TOKENS[0]}")
        # Removing a line would give every later entry another id than in the samples and models made before.
        spare = next(entry for entry in map("[unused{}]".format, itertools.count()) if entry not in self.ids)
        advice = f"write {spare} in its place, which keeps the ids of all other entries; do not remove the line"
        for index, word in enumerate(self.words):
            if word.split() != [word]:
                raise InputError(f"{source}:{index + 1}: entry {word!r} is empty or has white space in it; {advice}")
            if self.ids[word] != index:
                last = self.ids[word] + 1
                text = f"entry {word!r} is on line {last} too, and tokenizers take the last one"
                raise InputError(f"{source}:{index + 1}: {text}; {advice}")
        if missing := [token for token in SPECIAL_TOKENS if token not in self.ids]:
            raise InputError(f"{source}: special token {missing[0]} is missing; the file needs {' '.join(SPECIAL_TOKENS)}")
        if self.words[0] != SPECIAL_TOKENS[0]:
            raise InputError(f"{source}:1: the first entry is {self.words[0]!r}, not [PAD]; [PAD] must have the id 0")

    @classmethod
    def read(cls, path: AnyPath) -> "Vocabulary":
        """The vocabulary in a file: UTF-8, one entry per line, or a `tokenizer.json` of WordPieces."""
        if Path(path).suffix == ".json":
            return cls._from_json(path)
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; give a vocabulary with one entry per line") from None
        except IsADirectoryError:
            raise InputError(f"{path}: a folder; give the vocabulary file in it") from None
        # Not splitlines(): it would also split at characters like U+2028, which are not line ends in this format.
        if content.startswith(codecs.BOM_UTF8):
            raise InputError(
                f"{path}:1: starts with a byte order mark, which would be part of [PAD]; save it as UTF-8 without one"
            )
        lines = decode_block(content, path).replace("\r\n", "\n").removesuffix("\n").split("\n")
        return cls([] if lines == [""] else lines, path)

    @classmethod
    def _from_json(cls, path: AnyPath) -> "Vocabulary":
        """The vocabulary of a `tokenizer.json`, the file of the library `tokenizers`."""
        content = read_json(path)
        try:
            model = content["model"]
            if model["type"] != "WordPiece":
                raise InputError(f"{path}: its tokenizer is a {model['type']}; only BERT's WordPiece can be read")
            entries = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
            return cls._by_id(entries, path)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a tokenizer of the library tokenizers ({error!r}); save it again") from None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a tokenizer, ordered by id."""
        return cls._by_id(tokenizer.get_vocab(), f"tokenizer {tokenizer.name_or_path}")

    @classmethod
    def _by_id(cls, ids: dict[str, int], name: object) -> "Vocabulary":
        """The vocabulary of entries by id; `name` is for messages."""
        entries = sorted(ids.items(), key=lambda entry: entry[1])
        if [index for _, index in entries] != list(range(len(entries))):
            raise InputError(f"{name}: its ids are not 0..{len(entries) - 1}; use a tokenizer of BERT's kind")
        return cls([word for word, _ in entries], name)

    def ordinary_ids(self, pieces: bool = False) -> np.ndarray:
        """Ids of the words, ascending, (W,) int32: no special tokens, no [unusedN], and ##pieces only with `pieces`."""
        return self._ids_of_words_and_pieces if pieces else self._word_ids

    @functools.cached_property
    def _ids_of_words_and_pieces(self) -> np.ndarray:
        is_word_or_piece = [_is_ordinary(word) or word.startswith("##") for word in self.words]
        return np.flatnonzero(is_word_or_piece).astype(np.int32)

    def changed_by(self, tokenizer: Any) -> frozenset[str]:
        """The ordinary words that a tokenizer of the library `tokenizers` doesn't turn into one token that is the word."""
        ids = self.ordinary_ids().tolist()
        words = [self.words[index] for index in ids]
        encodings = tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return frozenset(word for word, index, encoding in zip(words, ids, encodings, strict=True) if encoding.ids != [index])

    def encode(self, texts: list[str], source: object) -> tuple[np.ndarray, np.ndarray]:
        """Sentences of ordinary words, as ids (n, T) int32, padded with `pad_id`, and their lengths (n,) int32 in words."""
        flat, lengths = self._index.encode_texts(texts, source)
        return padded(self._word_ids[flat], lengths, self.pad_id), lengths

    def encode_text(self, text: bytes, source: object, first_sentence: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """`pcfg.common.words.WordIndex.encode`, with ids for indices."""
        flat, lengths = self._index.encode(text, source, first_sentence)
        return self._word_ids[flat], lengths

    @functools.cached_property
    def _index(self) -> WordIndex:
        return WordIndex([self.words[index] for index in self._word_ids], self._why_unknown)

    def _why_unknown(self, word: str) -> str:
        if word in self.ids:
            return "is reserved in the vocabulary and can't be a word; replace it"
        if word.lower() in self.ids and _is_ordinary(word.lower()):
            return f"is not in the vocabulary, {word.lower()!r} is; write the text in lower case"
        return f"is not in the vocabulary ({self.size} entries); add it or take the vocabulary made for this text"

    def write(self, path: AnyPath) -> None:
        """Write one entry per line, for `read`."""
        with atomic_open(path) as file:
            file.write("\n".join(self.words) + "\n")


def find_vocabulary(name: AnyPath, nearby: list[Path]) -> Path:
    """The vocabulary file that a user means by `name`; prints its path and size.

    A path with a folder in it is taken as it is; a bare name is looked up in each folder of `nearby`, then in the working
    directory.
    """
    name = os.fspath(name)
    folders = [] if os.path.dirname(name) else nearby
    places = list(dict.fromkeys([*(Path(folder) / name for folder in folders), Path(name)]))
    for path in places:
        if path.is_file():
            print(f"vocabulary: {path}, {Vocabulary.read(path).size} entries")
            return path
    raise InputError(f"vocabulary {name}: no such file; looked for {', '.join(map(str, places))}; give its path")


def _check_same_entries(tokenizer: Any, vocabulary: Vocabulary, source: object) -> None:
    if tokenizer.get_vocab() != vocabulary.ids:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} entries that are not the {vocabulary.size} of its "
            "vocabulary; make it again"
        )


def check_single_tokens(tokenizer: Any, words: list[str]) -> None:
    """Check that the tokenizer turns each word, of at least one, into one token that is the word."""
    ids = tokenizer.get_vocab()
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"]
    if changed := [word for word, pieces in zip(words, encoded, strict=True) if pieces != [ids.get(word)]]:
        raise InputError(
            f"word {changed[0]!r} is not one token: the tokenizer {tokenizer.name_or_path} makes "
            f"{' '.join(tokenizer.tokenize(changed[0]))} of it ({len(changed)} such words); "
            "replace the word, or use a vocabulary (or letter case) that has it"
        )


def save_tokenizer(folder: AnyPath, tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's files, its name (`tokenizer.name_or_path`) and vocab.txt into a folder, which may be new."""
    folder = Path(folder)
    _check_same_entries(tokenizer, vocabulary, folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    vocabulary.write(folder / VOCABULARY_FILE)
    # transformers leaves the name out; resolve_tokenizer needs it to recognise the tokenizer of a model folder.
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "name_or_path": tokenizer.name_or_path})


def _is_tokenizer_folder(folder: Path) -> bool:
    # vocab.txt alone is no sign: folders of text have one too.
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name != VOCABULARY_FILE)


def _has_name(folder: Path, name: str) -> bool:
    """Whether the tokenizer saved directly in `folder` was called `name` (a path counts by its last part).

    The name is in tokenizer_config.json, and in the arguments that the model of a model folder was trained with.
    """
    if not _is_tokenizer_folder(folder):
        return False
    saved = []
    if (folder / "tokenizer_config.json").is_file():
        saved.append(read_json(folder / "tokenizer_config.json").get("name_or_path"))
    if (folder / "args.json").is_file():
        saved.append((read_json(folder / "args.json").get("arguments") or {}).get("tokenizer_name"))
    return any(name in (other, Path(other).name) for other in saved if other)


def _load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a local folder, checked against its vocab.txt, if any."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # TypeError, ...: JSON of another shape
        raise InputError(f"{folder}: its tokenizer can't be loaded ({error}); make the folder again") from error
    Vocabulary.from_tokenizer(tokenizer)  # without tokenizer.json transformers silently gives one of 5 entries: refused
    if (folder / VOCABULARY_FILE).is_file():
        _check_same_entries(tokenizer, Vocabulary.read(folder / VOCABULARY_FILE), folder)
    tokenizer.name_or_path = name
    return tokenizer


def resolve_tokenizer(name: str, nearby: list[Path]) -> Any:
    """The tokenizer that a user means by `name`, a fast one whose `name_or_path` is `name`; prints its place.

    Looked up in this order: for each folder of `nearby` (samples or a model) its subfolder `name`, then the folder itself if
    its tokenizer was saved under that name (model folders); then `name` as a local folder; then the hub (its local cache only,
    unless the environment says HF_HUB_OFFLINE=0).
    """
    candidates = []
    for folder in map(Path, nearby):
        candidates.append((folder / name, _is_tokenizer_folder(folder / name)))
        candidates.append((folder, _has_name(folder, name)))
    candidates.append((Path(name), _is_tokenizer_folder(Path(name))))
    for place, has_tokenizer in candidates:
        if has_tokenizer:
            tokenizer = _load_tokenizer(place, name)
            print(f"tokenizer: {place}, {len(tokenizer)} entries")
            return tokenizer
    if Path(name).is_dir():  # transformers would make an empty tokenizer of it
        raise InputError(f"tokenizer {name}: the folder has no tokenizer.json or tokenizer_config.json; make it again")
    return _load_from_hub(name, [place for place, _ in candidates])


def hub_is_off() -> bool:
    """Whether only the hub's local cache may be used: unless the user set HF_HUB_OFFLINE=0."""
    return os.environ.get("HF_HUB_OFFLINE", "1").lower() not in ("0", "false", "no", "off")


def _load_from_hub(name: str, places: list[Path]) -> Any:
    from transformers import AutoTokenizer

    offline = hub_is_off()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except (OSError, ValueError) as error:
        hub = "the hub's local cache (the hub is off; HF_HUB_OFFLINE=0 turns it on)" if offline else f"the hub: {error}"
        looked = ", ".join([*map(str, places), hub])
        raise InputError(
            f"tokenizer {name}: not found; looked in {looked}; give the --model_name of generate_samples.py, "
            "or a folder with a tokenizer"
        ) from error
    Vocabulary.from_tokenizer(tokenizer)
    print(f"tokenizer: {name} from the hub, {len(tokenizer)} entries")
    return tokenizer
