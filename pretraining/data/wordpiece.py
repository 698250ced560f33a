"""BERT's tokenizer and its files, by the library `tokenizers` alone: transformers takes seconds to import.

The files are those of `vocabulary.save_tokenizer` and transformers' BertTokenizerFast, byte for byte.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from pcfg.common.files import AnyPath, InputError, atomic_open, read_json, write_json
from pretraining.data.vocabulary import SPECIAL_TOKENS, VOCABULARY_FILE, Vocabulary

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS
OWN_TOKENIZER = "tokenizer"


def wordpiece(vocabulary: Vocabulary, do_lower_case: bool) -> Tokenizer:
    """BERT's tokenizer for a vocabulary; `do_lower_case` strips accents as well."""
    tokenizer = Tokenizer(WordPiece(vocabulary.ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=do_lower_case
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    add_special_tokens(tokenizer, vocabulary)
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Add special tokens to a tokenizer, which puts them around a text, [CLS] a [SEP], or a pair, [CLS] a [SEP] b [SEP]."""
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary.cls_id), (SEP, vocabulary.sep_id)],
    )


def find_own_tokenizer(folder: AnyPath, vocabulary: Vocabulary) -> Tokenizer | None:
    """The tokenizer that a folder of text came with, in its subfolder `tokenizer`; None if there is none."""
    path = Path(folder) / OWN_TOKENIZER / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise InputError(f"{path}: can't be loaded ({error}); make the text again") from None
    if tokenizer.get_vocab() != vocabulary.ids:
        raise InputError(
            f"{path}: the text's own tokenizer has {tokenizer.get_vocab_size()} entries that are not the {vocabulary.size} of "
            "the vocabulary; leave --vocab_file out, to take the one next to the text"
        )
    return tokenizer


def check_same_tokenizer(path: Path, vocabulary: Vocabulary, do_lower_case: bool) -> None:
    """Check that a `tokenizer.json` with the entries of `vocabulary` normalises, splits and looks up as `wordpiece` does."""
    theirs = read_json(path)
    ours = json.loads(wordpiece(vocabulary, do_lower_case).to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        settings = theirs.get(part)
        if not isinstance(settings, dict):
            settings = {"type": settings}
        for key, expected in ours[part].items():
            if key != "vocab" and settings.get(key, expected) != expected:
                lower = f"give --do_lower_case {int(not do_lower_case)}"
                advice = lower if key == "lowercase" else "only BERT's own tokenizer can be used"
                raise InputError(f"{path}: {part} has {key} {settings[key]!r}, BERT's here {expected!r}; {advice}")


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, vocabulary: Vocabulary, max_length: int, name: str, do_lower_case: bool | None = None
) -> None:
    """Write a tokenizer with our special tokens into an existing folder, for AutoTokenizer and `vocabulary.resolve_tokenizer`.

    Args:
        max_length: of an input in tokens, [CLS] and [SEP] included.
        name: for `resolve_tokenizer`.
        do_lower_case: that of `wordpiece`; None for another tokenizer, whose tokenizer.json is complete.
    """
    kind: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if do_lower_case is not None:
        kind = {"do_lower_case": do_lower_case, "strip_accents": None, "tokenize_chinese_chars": True}
        kind["tokenizer_class"] = "BertTokenizer"
    with atomic_open(folder / "tokenizer.json") as file:  # tokenizers' own save() reports a full disk as a bare Exception
        file.write(tokenizer.to_str(pretty=True))
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    configuration = {**kind, **special, "backend": "tokenizers", "model_max_length": max_length}
    write_json(folder / "tokenizer_config.json", {**dict(sorted(configuration.items())), "name_or_path": name})
    vocabulary.write(folder / VOCABULARY_FILE)
