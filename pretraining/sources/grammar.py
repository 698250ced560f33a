"""Text from a grammar: sentences drawn from it, in shards."""

import argparse
import functools
from pathlib import Path

from pcfg.common.cli import non_negative_int
from pcfg.common.executors import add_executor_arguments, executor_options
from pcfg.common.files import InputError, keyed_rng, sha256
from pcfg.common.text import shown
from pcfg.grammar import Grammar, find_rules
from pcfg.sampler import DRAWING, Sampler
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.data.wordpiece import wordpiece
from pretraining.sources.text_shards import Shard, TextFolder, add_folder_arguments, add_shard_arguments, list_shards

SIZE_SAMPLE = 2_000  # sentences from which the mean size of a sentence is estimated


def make_shard(sampler: Sampler, folder: Path, seed: int, shard: Shard) -> dict:
    """Draw and write one shard; returns its entry in the manifest."""
    rng = keyed_rng(seed, f"pretraining-{shard.split}", shard.number)
    return shard.write(folder, sampler.draw_text(shard.sentences, rng))


def vocabulary_bytes(grammar: Grammar, vocab_file: str | None) -> bytes:
    """The content of vocab.txt: the special tokens and the grammar's words, or `vocab_file` if it has all of them."""
    for token in SPECIAL_TOKENS:
        if token in grammar.words:
            raise InputError(f"{token}: a special token as a word of the grammar; rename the word")
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *grammar.words]) if vocab_file is None else Vocabulary.read(vocab_file)
    if missing := [word for word in grammar.words if word not in vocabulary.ids]:
        raise InputError(
            f"{vocab_file}: {missing[0]!r} is not in this vocabulary ({len(missing)} of {len(grammar.words)} words "
            "missing); one word must be one token: give another vocabulary, or leave --vocab-file out"
        )
    _refuse_changed_words(grammar, vocabulary)
    return Path(vocab_file).read_bytes() if vocab_file else "".join(f"{word}\n" for word in vocabulary.words).encode()


def _refuse_changed_words(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Refuse words that BERT's tokenizer never takes as one token; say so if it needs another --do_lower_case for some."""
    ordinary = {vocabulary.words[index] for index in vocabulary.ordinary_ids()}
    for lower in (False, True):
        changed = vocabulary.changed_by(wordpiece(vocabulary, do_lower_case=lower))
        wrong = [word for word in grammar.words if word not in ordinary or word in changed]
        listed = ", ".join(map(shown, wrong[:5])) + (f" and {len(wrong) - 5:,} more" if len(wrong) > 5 else "")
        if wrong and not lower:
            raise InputError(
                f"--rule-path: the words {listed} are not one token each: BERT's tokenizer splits at punctuation, and keeps "
                "##... and [unused...] for itself; replace them, such as 's by possessive"
            )
        if wrong:
            print(f"words with capitals or accents: {listed}; generate_samples.py needs --do_lower_case 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    text = "grammar file (rules format or nltk's PCFG format), or the name of a shipped one"
    files.add_argument("--rule-path", required=True, help=text)
    add_folder_arguments(files)
    text = "copy this vocabulary to vocab.txt, after a check; default: special tokens and grammar's words"
    files.add_argument("--vocab-file", help=text)
    add_shard_arguments(parser.add_argument_group("sizes"), length_limit=32)
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=non_negative_int, default=0, help="seed of all random numbers; default 0")
    add_executor_arguments(running)


def generate(options: argparse.Namespace) -> None:
    """Write the text that the command line asks for."""
    shards = list_shards(options)
    executor = executor_options(options, local="threads")
    grammar = Grammar.read(find_rules(options.rule_path))
    sampler = Sampler(grammar, options.length_limit - 1)
    vocabulary = vocabulary_bytes(grammar, options.vocab_file)
    made_from = {
        "grammar_sha256": grammar.sha256,
        "drawing": DRAWING,
        "seed": options.seed,
        "max_words": sampler.width,
        "sentence_num": options.sentence_num,
        "test_sentence_num": options.test_sentence_num,
        "vocabulary": "the grammar's words" if options.vocab_file is None else sha256(options.vocab_file),
    }
    text = TextFolder(options.save_path, made_from, shards, options.overwrite)
    size_sample = sampler.draw_text(SIZE_SAMPLE, keyed_rng(options.seed, "pretraining-plan"))
    sentence_bytes = sum(len(block) + 1 for block, _ in size_sample) / SIZE_SAMPLE
    share = sampler.length_probability.sum()
    text.check_disk(sentence_bytes, f"sentences of at most {sampler.width} words, {share:.2%} of the grammar's")
    text.write_vocabulary(vocabulary)
    # Absolute, because a Ray task may run in another working directory.
    text.write_shards(functools.partial(make_shard, sampler, options.save_path.absolute(), options.seed), **executor)
