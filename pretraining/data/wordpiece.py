"""BERT's tokenizer, its files and a check of words, by the library `tokenizers` alone: transformers takes seconds to import.

The files are those that `vocabulary.save_tokenizer` writes of `vocabulary.build_tokenizer`, byte for byte.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from pcfg.artefacts import InputError, atomic_open, read_json, write_json
from pretraining.data.vocabulary import SPECIAL_TOKENS, VOCABULARY_FILE, Vocabulary

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS


def wordpiece(vocabulary: Vocabulary, do_lower_case: bool) -> Tokenizer:
    """BERT's tokenizer for a vocabulary; `do_lower_case` strips accents as well."""
    tokenizer = Tokenizer(WordPiece(vocabulary.ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=do_lower_case
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary.cls_id), (SEP, vocabulary.sep_id)],
    )
    return tokenizer


def ordinary_words_changed(vocabulary: Vocabulary, do_lower_case: bool) -> frozenset[str]:
    """The ordinary words of a vocabulary that its tokenizer doesn't turn into one token that is the word."""
    ids = vocabulary.ordinary_ids().tolist()
    words = [vocabulary.words[index] for index in ids]
    encodings = wordpiece(vocabulary, do_lower_case).encode_batch_fast(words, add_special_tokens=False)
    return frozenset(word for word, index, encoding in zip(words, ids, encodings, strict=True) if encoding.ids != [index])


def check_same_tokenizer(path, vocabulary: Vocabulary, do_lower_case: bool) -> None:
    """Check that a `tokenizer.json` whose entries are `vocabulary` cuts a text as `wordpiece` does.

    Raises:
        InputError: it normalises, splits or looks up otherwise; names the first difference.
    """
    theirs, ours = read_json(path), json.loads(wordpiece(vocabulary, do_lower_case).to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        there = theirs.get(part) if isinstance(theirs.get(part), dict) else {"type": theirs.get(part)}
        for key in ours[part]:
            if key != "vocab" and there.get(key, ours[part][key]) != ours[part][key]:
                flag = (
                    f"give --do_lower_case {int(not do_lower_case)}" if key == "lowercase" else "only BERT's own can be taken"
                )
                raise InputError(f"{path}: {part} has {key} {there[key]!r}, BERT's here {ours[part][key]!r}; {flag}")


def save_wordpiece(folder, vocabulary: Vocabulary, do_lower_case: bool, max_length: int, name: str) -> None:
    """Write the tokenizer, as AutoTokenizer and `vocabulary.resolve_tokenizer` find it, into a folder that is there.

    Args:
        max_length: longest input in tokens, [CLS] and [SEP] included.
        name: by which `resolve_tokenizer` recognises it.
    """
    folder = Path(folder)
    with atomic_open(folder / "tokenizer.json") as file:  # tokenizers' own save() reports a full disk as a bare Exception
        file.write(wordpiece(vocabulary, do_lower_case).to_str(pretty=True))
    configuration = {
        "backend": "tokenizers",
        "cls_token": CLS,
        "do_lower_case": do_lower_case,
        "mask_token": MASK,
        "model_max_length": max_length,
        "pad_token": PAD,
        "sep_token": SEP,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
        "unk_token": UNK,
        "name_or_path": name,
    }
    write_json(folder / "tokenizer_config.json", configuration)
    vocabulary.write(folder / VOCABULARY_FILE)
