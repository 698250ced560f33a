"""Text from a causal language model that is restricted to its most frequent tokens: sentences sampled from it, in shards.

    python generate_pretraining.py --source opt --model-name facebook/opt-125m --save-path opt_dataset

That is 200 million sentences, work for a GPU. With a small model's folder, on a laptop:

    python generate_pretraining.py --source opt --model-name MODEL --save-path opt_mini --sentence-num 10000 --shard-num 2 \\
        --test-shard-num 1 --test-sentence-num 1000 --frequency-sentences 2000

The law of a sentence is that of `pretraining.sources.opt.causal_lm`, at temperature 1. Its tokens are drawn by inverting the
cumulative probabilities, in float64, at one uniform number each: sentence i of a shard has the same numbers in any batch. So a
shard is a function of the model, the kept tokens, the seed, its kind and number, and the rounding of the model's arithmetic:
that of the kind of device, the dtype and --batch-size, of which the first two are part of the folder's record, and the last
changes a token in some hundred thousand (float32).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.cli import non_negative_int, positive_int
from pcfg.common.executors import end_if_asked, run_jobs
from pcfg.common.files import InputError, Manifest, atomic_folder, keyed_rng
from pcfg.common.text import write_shard
from pretraining.data.vocabulary import SPECIAL_TOKENS, TOKENIZER_FILES, Vocabulary
from pretraining.data.wordpiece import OWN_TOKENIZER, save_own_tokenizer
from pretraining.sources.opt.causal_lm import (
    TOP_TOKENS,
    RestrictedLM,
    Restriction,
    check_model,
    find_device,
    load_causal_lm,
    read_restriction,
)
from pretraining.sources.opt.escaped_tokens import build_tokenizer, token_bytes
from pretraining.sources.opt.sampling import DRAWING, choose_tokens, count_tokens, sample
from pretraining.sources.text_shards import (
    Shard,
    add_shard_arguments,
    check_disk,
    complete_names,
    list_shards,
    open_manifest,
    write_vocabulary,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PieceSampler:
    """Lines of pieces from a restricted model.

    Args:
        restricted: the model.
        pieces: (V,) the words of its columns.
        batch_size: sentences at once.
    """

    def __init__(self, restricted: RestrictedLM, pieces: list[str], batch_size: int):
        self.restricted, self.pieces, self.batch_size = restricted, pieces, batch_size

    def draw_text(self, sentences: int, rng: np.random.Generator) -> Iterator[tuple[bytes, int, int]]:
        """Yield blocks of `sentences` lines in all, an empty line between two, with their numbers of sentences and of words."""
        for first in range(0, sentences, self.batch_size):
            number = min(self.batch_size, sentences - first)
            tokens = sample(self.restricted, rng.random((number, self.restricted.max_tokens)))
            lengths = (tokens != self.restricted.end).sum(axis=1)
            lines = (
                " ".join([self.pieces[column] for column in row[:length]])
                for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
            )
            yield ("\n\n".join(lines) + "\n").encode(), number, int(lengths.sum())


def make_shard(sampler: PieceSampler, folder: Path, seed: int, report: Callable[[int], object], shard: Shard) -> dict:
    """Draw and write one shard, a batch at a time; returns what the manifest says of it.

    `report` is told the sentences of each batch.
    """
    rng = keyed_rng(seed, f"language-model-{shard.split}", shard.number)
    words = 0

    def blocks() -> Iterator[bytes]:
        nonlocal words
        for text, sentences, block_words in sampler.draw_text(shard.sentences, rng):
            end_if_asked()
            words += block_words
            report(sentences)
            yield text

    written = write_shard(folder / shard.name, blocks())
    return {**written, "sentences": shard.sentences, "words": words, "batch_size": sampler.batch_size}


def special_ids(model: torch.nn.Module, tokenizer, name: str) -> tuple[int, int]:
    """The ids of the start token (the tokenizer's bos, else its eos) and of the end token (eos), in a model's vocabulary.

    Raises:
        InputError: there is no end token, or one that the model doesn't have.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"--model-name {name}: its tokenizer has no end token (eos_token); sentences would never end")
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if max(start, end) >= model.config.vocab_size:
        raise InputError(
            f"--model-name {name}: its tokenizer's start or end token ({start}, {end}) is none of the model's "
            f"{model.config.vocab_size} tokens; the tokenizer is another model's"
        )
    return start, end


class Language:
    """What the command line says of the language: model, kept tokens, device.

    Raises:
        InputError: the model can't be used, or the device not be had.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.max_tokens = options.length_limit - 1
        self.device = find_device(options.device)
        fast = self.device == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = options.dtype or ("bfloat16" if fast else "float32")
        self.jobs = 1 if self.device == "cuda" else min(options.n_processes, os.cpu_count() or 1)
        self.model, self.tokenizer, self.sha256 = load_causal_lm(options.model_name, self.device, DTYPES[self.dtype])
        self.start_id, self.end_id = special_ids(self.model, self.tokenizer, options.model_name)
        self.given = self._given()

    def _given(self) -> Restriction | None:
        """The kept tokens of --top-tokens-file, the first --top-tokens of them."""
        options = self.options
        if options.top_tokens_file is None:
            return None
        found = read_restriction(options.top_tokens_file)
        check_model(found, options.top_tokens_file, options.model_name, self.sha256)
        if options.top_tokens is not None and options.top_tokens > len(found.kept):
            raise InputError(
                f"--top-tokens {options.top_tokens}: {options.top_tokens_file} has {len(found.kept)}; leave --top-tokens out"
            )
        number = options.top_tokens
        return self._restriction(found.kept[:number], found.pieces[:number], found.counts[:number], found.estimated)

    def _restriction(self, kept: list, pieces: list, counts: list, estimated: dict) -> Restriction:
        name, ends = self.options.model_name, (self.start_id, self.end_id)
        return Restriction(name, self.sha256, kept, pieces, counts, *ends, self.max_tokens, estimated)

    @property
    def top_tokens(self) -> int:
        """How many tokens are kept."""
        return len(self.given.kept) if self.given else self.options.top_tokens or 2000

    def facts(self) -> dict:
        """What decides the text, as plain values for the manifest."""
        options = self.options
        frequencies = {"sentences": options.frequency_sentences, "seed": options.seed}
        if self.given:
            frequencies = {"kept_sha256": hashlib.sha256(json.dumps(self.given.kept).encode()).hexdigest()}
        return {
            "model_sha256": self.sha256,
            "top_tokens": self.top_tokens,
            "frequencies": frequencies,
            "drawing": DRAWING,
            "seed": options.seed,
            "max_words": self.max_tokens,
            "sentence_num": options.sentence_num,
            "test_sentence_num": options.test_sentence_num,
            "device": self.device,
            "dtype": self.dtype,
        }

    def check(self) -> None:
        """Refuse sizes that the model doesn't have before anything is sampled.

        Raises:
            InputError: --top-tokens or --length-limit is too large.
        """
        choose_tokens(np.zeros(self.model.config.vocab_size), self.known_tokens(), self.top_tokens, self.end_id)
        RestrictedLM(self.model, [0], self.start_id, self.end_id, self.max_tokens)

    def known_tokens(self) -> dict[int, bytes]:
        """The bytes of the tokens that both the tokenizer and the model have, by id."""
        size = self.model.config.vocab_size
        return {index: token for index, token in token_bytes(self.tokenizer).items() if index < size}

    def restriction(self) -> Restriction:
        """The kept tokens, those that are given or the most frequent of a sample."""
        if self.given:
            return self.given
        options = self.options
        ends = self.start_id, self.end_id, self.max_tokens
        sentences, batch = options.frequency_sentences, options.batch_size
        counts = count_tokens(self.model, *ends, options.seed, sentences, batch, self.jobs)
        kept, pieces = choose_tokens(counts, self.known_tokens(), self.top_tokens, self.end_id)
        seen, total = counts[kept], int(counts.sum())
        print(f"top tokens: {len(kept):,} make up {seen.sum() / total:.2%} of {total:,} sampled tokens")
        if not seen.all():
            print(f"top tokens: {(seen == 0).sum():,} of them were never seen; --frequency-sentences may be too small")
        estimated = {
            "seed": options.seed,
            "sentences": sentences,
            "tokens": total,
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": batch,
        }
        return self._restriction(kept, pieces, seen.tolist(), estimated)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model-name",
        default="facebook/opt-125m",
        help="folder of a causal language model of transformers, or its name on the hub (which is off unless "
        "HF_HUB_OFFLINE=0); default facebook/opt-125m",
    )
    files.add_argument("--save-path", type=Path, required=True, help="folder for the text; made if missing")
    files.add_argument(
        "--top-tokens-file",
        type=Path,
        help="keep the tokens of this top_tokens.json (or of the one in this folder); default: the most frequent of a sample",
    )
    files.add_argument("--overwrite", action="store_true", help="replace text that was made otherwise; default: refuse")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--top-tokens", type=positive_int, help="how many tokens are kept; default 2000, or all of --top-tokens-file"
    )
    sizes.add_argument(
        "--frequency-sentences",
        type=positive_int,
        default=20_000,
        help="sentences of the unrestricted model from which the frequencies of its tokens are estimated; default 20000",
    )
    add_shard_arguments(sizes, length_limit=24)
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    running.add_argument("--batch-size", type=positive_int, default=256, help="sentences sampled at once; default 256")
    running.add_argument("--device", choices=("cpu", "cuda"), help="where the model runs; default: cuda if it is there")
    running.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what the model computes in; default: bfloat16 on cuda with support for it, else float32",
    )
    running.add_argument(
        "--n_processes",
        type=positive_int,
        default=os.cpu_count() or 1,
        help="shards that are worked on at once on the CPU, a thread each; changes the time and nothing else; "
        "default: the number of cores",
    )


def plan(sampler: PieceSampler, seed: int, jobs: int, wanted: list[Shard], shards: list[Shard], folder: Path) -> None:
    """Sample a batch, print from it the bytes and the time of the wanted shards, and check the disk.

    Raises:
        InputError: the disk can't hold them.
    """
    rng = keyed_rng(seed, "language-model-plan")
    begun = time.perf_counter()
    text, sentences, _ = next(sampler.draw_text(sampler.batch_size, rng))
    each = (time.perf_counter() - begun) / sentences
    at_once = max(1, min(jobs, len(wanted)))
    seconds = sum(shard.sentences for shard in wanted) * each / at_once
    about = (
        f"sentences of at most {sampler.restricted.max_tokens} of {len(sampler.pieces):,} pieces; about "
        f"{tqdm.format_interval(seconds)} ({1 / each:,.0f} sentences/s a shard, {at_once} at once)"
    )
    check_disk(folder, wanted, shards, (len(text) + 1) / sentences, about)


def write_tokens(restriction: Restriction, manifest: Manifest, folder: Path, overwrite: bool) -> None:
    """Write vocab.txt, the tokenizer and, as the sign that these are there, top_tokens.json."""
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *restriction.pieces])
    write_vocabulary(manifest, folder, ("\n".join(vocabulary.words) + "\n").encode(), overwrite)
    names = [f"{OWN_TOKENIZER}/{name}" for name in TOKENIZER_FILES]
    with atomic_folder(folder / OWN_TOKENIZER) as temporary:
        longest = restriction.max_tokens + 2  # [CLS] and [SEP] too
        save_own_tokenizer(temporary, build_tokenizer(vocabulary), vocabulary, longest, OWN_TOKENIZER)
    for name in names:
        manifest.add(name)
    restriction.write(folder)
    manifest.add(TOP_TOKENS)


def refuse_strangers(folder: Path) -> None:
    """Raise an `InputError` if what would be written is there, where there is no record of it."""
    for name in (OWN_TOKENIZER, TOP_TOKENS):
        if (folder / name).exists():
            raise InputError(f"{folder / name}: not of this script; give another --save-path, or --overwrite to replace it")


def _is_complete(manifest: Manifest) -> bool:
    """Whether the files of `write_tokens` are there and unchanged."""
    names = ["vocab.txt", TOP_TOKENS, *(f"{OWN_TOKENIZER}/{name}" for name in TOKENIZER_FILES)]
    return all(manifest.is_complete(name) for name in names)


def generate(options: argparse.Namespace) -> None:
    """Make the text that the command line asks for."""
    shards = list_shards(options)
    # Jobs are threads of ours, with none within, so that neither their number nor that of cores changes a sum.
    torch.set_num_threads(1)
    language = Language(options)
    try:
        _generate(options, language, shards)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch-size {options.batch_size}: not enough memory on {language.device}; give a smaller one"
        ) from error


def _generate(options: argparse.Namespace, language: Language, shards: list[Shard]) -> None:
    language.check()
    folder = options.save_path
    manifest = open_manifest(folder, language.facts(), options.overwrite)
    complete = complete_names(manifest, shards)
    wanted = [shard for shard in shards if shard.name not in complete]
    if not manifest.names() and not options.overwrite:
        refuse_strangers(folder)
    if _is_complete(manifest):
        restriction = read_restriction(folder)
    else:
        restriction = language.restriction()
        write_tokens(restriction, manifest, folder, options.overwrite)
    restricted = RestrictedLM(
        language.model, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens
    )
    sampler = PieceSampler(restricted, restriction.pieces, options.batch_size)
    if wanted:
        plan(sampler, options.seed, language.jobs, wanted, shards, folder)
    sentences = sum(shard.sentences for shard in wanted)
    with tqdm(total=sentences, desc="sentences", unit="", unit_scale=True, position=1, disable=not wanted) as progress:
        function = functools.partial(make_shard, sampler, folder, options.seed, progress.update)
        with contextlib.closing(run_jobs(function, wanted, language.jobs, "text shards", "threads")) as made:
            for shard, facts in made:
                manifest.add(shard.name, **facts)
    print(
        f"{folder}: {len(wanted)} shards made, {len(shards) - len(wanted)} skipped as complete; vocab.txt, {TOP_TOKENS} and "
        f"{OWN_TOKENIZER}/ beside them"
    )
