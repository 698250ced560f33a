"""Text from a grammar: sentences drawn from it, in shards.

A shard is a function of the grammar, the seed, the length limit, its kind and its number.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from pcfg.artefacts import InputError, check_space, free_bytes, keyed_rng, sha256
from pcfg.cli import non_negative_int, positive_int
from pcfg.executors import add_executor_arguments, end_if_asked, executor_options, run_jobs
from pcfg.grammar import Grammar, find_rules
from pcfg.sampler import DRAWING, Sampler
from pcfg.text import SPLITS, decoded, write_shard
from pretraining.data.vocabulary import SPECIAL_TOKENS
from pretraining.sources.text_shards import Shard, complete_names, open_manifest, write_vocabulary

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


def check_disk(sampler: Sampler, seed: int, folder: Path, wanted: list[Shard], shards: list[Shard]) -> None:
    """Print the plan, and raise an `InputError` if the disk can't hold the shards that are `wanted`."""
    sample = sampler.draw_text(PLAN_SAMPLE, keyed_rng(seed, "pretraining-plan"))
    sentence_bytes = sum(len(text) + 1 for text, _ in sample) / PLAN_SAMPLE
    needed = sum(shard.sentences for shard in wanted) * sentence_bytes
    for split in SPLITS:
        numbers = [shard.sentences for shard in shards if shard.split == split]
        total = sum(numbers)
        print(f"plan: {len(numbers):,} {split} shards, {total:,} sentences, {total * sentence_bytes / 1e9:.3g} GB")
    print(
        f"plan: {len(shards) - len(wanted):,} shards are complete, {len(wanted):,} to make, {needed / 1e9:.3g} GB in {folder} "
        f"({free_bytes(folder) / 1e9:.3g} GB free); sentences of at most {sampler.width} words, "
        f"{sampler.length_probability.sum():.2%} of the grammar's"
    )
    check_space(folder, needed)


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
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--sentence-num", type=positive_int, default=1_000_000, help="sentences a training shard; default 1000000"
    )
    sizes.add_argument("--shard-num", type=non_negative_int, default=200, help="training shards; default 200")
    sizes.add_argument("--test-sentence-num", type=positive_int, default=10_000, help="sentences a test shard; default 10000")
    sizes.add_argument("--test-shard-num", type=non_negative_int, default=10, help="test shards; default 10")
    sizes.add_argument("--length-limit", type=positive_int, default=32, help="sentences have fewer words than this; default 32")
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    add_executor_arguments(running)


def generate(options: argparse.Namespace) -> None:
    """Make the text that the command line asks for."""
    if options.length_limit < 2:
        raise InputError(f"--length-limit {options.length_limit}: no sentence has fewer words; it must be 2 or more")
    if options.shard_num + options.test_shard_num == 0:
        raise InputError("--shard-num 0 --test-shard-num 0: nothing to make; ask for a shard at least")
    executor = executor_options(options, local="threads")
    grammar = Grammar.read(find_rules(options.rule_path))
    sampler = Sampler(grammar, options.length_limit - 1)
    vocabulary = vocabulary_bytes(grammar, options.vocab_file)

    folder, seed = options.save_path, options.seed
    shards = [Shard("training", i, options.sentence_num) for i in range(options.shard_num)]
    shards += [Shard("test", i, options.test_sentence_num) for i in range(options.test_shard_num)]
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
    check_disk(sampler, seed, folder, wanted, shards)
    write_vocabulary(manifest, folder, vocabulary, options.overwrite)
    # Absolute, as a Ray task may run in another working directory.
    function = functools.partial(make_shard, sampler, folder.absolute(), seed)
    with contextlib.closing(run_jobs(function, wanted, what="text shards", **executor)) as made:
        for shard, facts in made:
            manifest.add(shard.name, **facts)
    print(f"{folder}: {len(wanted)} shards made, {len(shards) - len(wanted)} skipped as complete; vocab.txt beside them")
