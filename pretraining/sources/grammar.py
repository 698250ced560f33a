"""Text from a grammar: sentences drawn from it, in shards.

A shard is a function of the grammar, the seed, the length limit, its kind and its number.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from pcfg.common.cli import non_negative_int
from pcfg.common.executors import add_executor_arguments, end_if_asked, executor_options, run_jobs
from pcfg.common.files import InputError, keyed_rng, sha256
from pcfg.common.text import decoded, write_shard
from pcfg.grammar import Grammar, find_rules
from pcfg.sampler import DRAWING, Sampler
from pretraining.data.vocabulary import SPECIAL_TOKENS
from pretraining.sources.text_shards import (
    Shard,
    add_shard_arguments,
    check_disk,
    complete_names,
    list_shards,
    open_manifest,
    write_vocabulary,
)

# Sentences from which the plan estimates bytes.
PLAN_SAMPLE = 2_000


def make_shard(sampler: Sampler, folder: Path, seed: int, shard: Shard) -> dict:
    """Draw and write one shard, a block of sentences at a time; returns what the manifest says of it."""
    rng = keyed_rng(seed, f"pretraining-{shard.split}", shard.number)
    words = 0

    def blocks() -> Iterator[memoryview]:
        nonlocal words
        for text, number in sampler.draw_text(shard.sentences, rng):
            end_if_asked()
            words += number
            yield text

    written = write_shard(folder / shard.name, blocks())
    return {**written, "sentences": shard.sentences, "words": words}


def vocabulary_bytes(grammar: Grammar, vocab_file: str | None) -> bytes:
    """The content of vocab.txt: the special tokens and the grammar's words, or that of `vocab_file`, checked.

    Raises:
        InputError: `vocab_file` can't be read, or lacks a special token or a word of the grammar; a word of the grammar is
            a special token.
    """
    for token in SPECIAL_TOKENS:
        if token in grammar.words:
            raise InputError(f"{token}: a special token as a word of the grammar; rename the word")
    if vocab_file is None:
        return "".join(f"{token}\n" for token in (*SPECIAL_TOKENS, *grammar.words)).encode()
    known = set(decoded(Path(vocab_file)).replace("\r\n", "\n").split("\n"))
    missing = [word for word in (*SPECIAL_TOKENS, *grammar.words) if word not in known]
    if missing:
        raise InputError(
            f"{vocab_file}: {missing[0]!r} is not in this vocabulary ({len(missing)} of {len(grammar.words)} words and "
            "special tokens missing); one word must be one token: take another vocabulary, or leave --vocab-file out"
        )
    return Path(vocab_file).read_bytes()


def sentence_bytes(sampler: Sampler, seed: int) -> float:
    """Mean bytes of a sentence, with the empty line after it, by a sample."""
    sample = sampler.draw_text(PLAN_SAMPLE, keyed_rng(seed, "pretraining-plan"))
    return sum(len(text) + 1 for text, _ in sample) / PLAN_SAMPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--rule-path", required=True, help="grammar file (rules format or nltk's PCFG format), or the name of a shipped one"
    )
    files.add_argument("--save-path", type=Path, required=True, help="folder for the text; made if missing")
    files.add_argument(
        "--vocab-file", help="copy this vocabulary to vocab.txt, after a check; default: special tokens and grammar's words"
    )
    files.add_argument("--overwrite", action="store_true", help="replace text that was made otherwise; default: refuse")
    add_shard_arguments(parser.add_argument_group("sizes"), length_limit=32)
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    add_executor_arguments(running)


def generate(options: argparse.Namespace) -> None:
    """Make the text that the command line asks for."""
    shards = list_shards(options)
    executor = executor_options(options, local="threads")
    grammar = Grammar.read(find_rules(options.rule_path))
    sampler = Sampler(grammar, options.length_limit - 1)
    vocabulary = vocabulary_bytes(grammar, options.vocab_file)

    folder, seed = options.save_path, options.seed
    made_from = {
        "grammar_sha256": grammar.sha256,
        "drawing": DRAWING,
        "seed": seed,
        "max_words": sampler.width,
        "sentence_num": options.sentence_num,
        "test_sentence_num": options.test_sentence_num,
        "vocabulary": "the grammar's words" if options.vocab_file is None else sha256(options.vocab_file),
    }
    manifest = open_manifest(folder, made_from, options.overwrite)
    complete = complete_names(manifest, shards)
    wanted = [shard for shard in shards if shard.name not in complete]
    lengths = f"sentences of at most {sampler.width} words, {sampler.length_probability.sum():.2%} of the grammar's"
    check_disk(folder, wanted, shards, sentence_bytes(sampler, seed), lengths)
    write_vocabulary(manifest, folder, vocabulary, options.overwrite)
    # Absolute, as a Ray task may run in another working directory.
    function = functools.partial(make_shard, sampler, folder.absolute(), seed)
    with contextlib.closing(run_jobs(function, wanted, what="text shards", **executor)) as made:
        for shard, facts in made:
            manifest.add(shard.name, **facts)
    print(f"{folder}: {len(wanted)} shards made, {len(shards) - len(wanted)} skipped as complete; vocab.txt beside them")
