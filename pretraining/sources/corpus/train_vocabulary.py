"""A WordPiece vocabulary (Schuster and Nakajima 2012; Devlin et al. 2019) trained on text, by the library `tokenizers`."""

from collections import Counter
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece

from pcfg.common.files import InputError
from pretraining.data.vocabulary import SPECIAL_TOKENS

MOST_LETTERS = 1000  # different characters that get an entry, as for BERT
LEAST_PAIRS = 2  # how often two pieces must meet to become one


def train_wordpiece(texts: Callable[[], Iterable[str]], size: int, do_lower_case: bool) -> list[str]:
    """The entries of a vocabulary by id: the special tokens, single characters, then pieces in the order of their merges.

    Args:
        texts: gives the lines of the text anew with each call: they are read twice.
        size: entries, special tokens counted; fewer come out of a small text.
        do_lower_case: whether the text is lower-cased and loses its accents, as the tokenizer of the vocabulary then must do.

    Raises:
        InputError: the text has more different characters than `size` has room for.
    """
    tokenizer = Tokenizer(WordPiece(unk_token=SPECIAL_TOKENS[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=None, lowercase=do_lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = Counter()
    for text in texts():
        letters.update(tokenizer.normalizer.normalize_str(text))
    common = sorted(letters.items(), key=lambda entry: (-entry[1], entry[0]))
    alphabet = sorted([letter for letter, _ in common if not letter.isspace()][:MOST_LETTERS])
    # All single characters have their ids beforehand: the trainer would number those inside words in the order of a hash map,
    # and break ties between pairs by these numbers, another vocabulary each time.
    entries = [*SPECIAL_TOKENS, *alphabet, *(f"##{letter}" for letter in alphabet)]
    if len(entries) > size:
        raise InputError(f"--vocab-size {size}: single characters alone take {len(entries)}; give more")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=LEAST_PAIRS,
        special_tokens=entries,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.get)
