"""transformers' own tokenizer of BERT for a vocabulary: for model folders of tests, and to compare ours with."""

from transformers import BertTokenizerFast

from pretraining.data.vocabulary import Vocabulary


def build_tokenizer(vocabulary: Vocabulary, do_lower_case: bool, max_length: int) -> BertTokenizerFast:
    """A tokenizer for inputs of at most `max_length` tokens, [CLS] and [SEP] included."""
    # vocab=, not vocab_file=: transformers 5 ignores vocab_file and silently builds a tokenizer of 5 entries.
    tokenizer = BertTokenizerFast(vocab=vocabulary.ids, do_lower_case=do_lower_case, model_max_length=max_length)
    assert tokenizer.get_vocab() == vocabulary.ids
    return tokenizer
