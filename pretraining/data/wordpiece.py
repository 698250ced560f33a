"""BERT's tokenizer, its files and a check of words, by the library `tokenizers` alone: transformers takes seconds to import.

The files are those that `vocabulary.save_tokenizer` writes of `vocabulary.build_tokenizer`, byte for byte.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from pcfg.artefacts import atomic_open, write_json
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
    add_special_tokens(tokenizer, vocabulary)
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Let a tokenizer know its special tokens and put them around a text, [CLS] a [SEP], or a pair, [CLS] a [SEP] b [SEP]."""
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary.cls_id), (SEP, vocabulary.sep_id)],
    )


def ordinary_words_changed(vocabulary: Vocabulary, do_lower_case: bool) -> frozenset[str]:
    """The ordinary words of a vocabulary that its tokenizer doesn't turn into one token that is the word."""
    ids = vocabulary.ordinary_ids().tolist()
    words = [vocabulary.words[index] for index in ids]
    encodings = wordpiece(vocabulary, do_lower_case).encode_batch_fast(words, add_special_tokens=False)
    return frozenset(word for word, index, encoding in zip(words, ids, encodings, strict=True) if encoding.ids != [index])


def save_wordpiece(folder, vocabulary: Vocabulary, do_lower_case: bool, max_length: int, name: str) -> None:
    """Write the tokenizer, as AutoTokenizer and `vocabulary.resolve_tokenizer` find it, into a folder that is there.

    Args:
        max_length: longest input in tokens, [CLS] and [SEP] included.
        name: by which `resolve_tokenizer` recognises it.
    """
    configuration = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": do_lower_case,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
    }
    write_tokenizer(Path(folder), wordpiece(vocabulary, do_lower_case), vocabulary, configuration, max_length, name)


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, vocabulary: Vocabulary, configuration: dict, max_length: int, name: str
) -> None:
    """Write the files of any tokenizer with our special tokens: tokenizer.json, tokenizer_config.json, vocab.txt.

    Args:
        configuration: what tokenizer_config.json says of its class.
        max_length, name: as `save_wordpiece`.
    """
    with atomic_open(folder / "tokenizer.json") as file:  # tokenizers' own save() reports a full disk as a bare Exception
        file.write(tokenizer.to_str(pretty=True))
    common = {
        "backend": "tokenizers",
        "cls_token": CLS,
        "mask_token": MASK,
        "model_max_length": max_length,
        "pad_token": PAD,
        "sep_token": SEP,
        "unk_token": UNK,
    }
    write_json(folder / "tokenizer_config.json", {**dict(sorted({**common, **configuration}.items())), "name_or_path": name})
    vocabulary.write(folder / VOCABULARY_FILE)
