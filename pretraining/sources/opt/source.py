"""Text from a causal language model that is restricted to its most frequent tokens: sentences sampled from it, in shards.

    python generate_pretraining.py --source opt --model-name facebook/opt-125m --save-path opt_dataset

This writes 200 million sentences and needs a GPU. With a small model's folder, on a laptop:

    python generate_pretraining.py --source opt --model-name MODEL --save-path opt_mini --sentence-num 10000 --shard-num 2 \\
        --test-shard-num 1 --test-sentence-num 1000 --frequency-sentences 2000

`pretraining.sources.opt.causal_lm` defines the distribution of a sentence; the temperature is 1. A token is drawn by inverting
the cumulative probabilities, in float64, at one uniform number; sentence i of a shard has the same numbers in any batch. The
rounding depends on device and dtype, which the folder's record names, and on --batch-size, which changes one token in some
hundred thousand (float32).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.cli import non_negative_int, positive_int
from pcfg.common.executors import add_processes_argument, end_if_asked, run_jobs
from pcfg.common.files import InputError, atomic_folder, keyed_rng
from pcfg.common.schema import write_schema
from pretraining.data.vocabulary import SPECIAL_TOKENS, TOKENIZER_FILES, Vocabulary
from pretraining.data.wordpiece import OWN_TOKENIZER, write_tokenizer
from pretraining.sources.opt import causal_lm
from pretraining.sources.opt.causal_lm import RestrictedLM, Restriction
from pretraining.sources.opt.escaped_tokens import build_tokenizer, escape, token_bytes, why_excluded
from pretraining.sources.text_shards import Shard, TextFolder, add_folder_arguments, add_shard_arguments, list_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How uniform numbers become tokens. It decides the bytes of the text, so change the name with the method.
DRAWING = "inverse cumulative probabilities, 1"
SENTENCES_PER_COUNT = 500  # of a job that counts tokens
TOKEN_FILES = ("vocab.txt", causal_lm.TOP_TOKENS, *(f"{OWN_TOKENIZER}/{name}" for name in TOKENIZER_FILES))


@torch.inference_mode()
def sample(restricted: RestrictedLM, uniform: np.ndarray) -> np.ndarray:
    """Sentences by inverting cumulative probabilities; sentences that ended leave the batch.

    Args:
        uniform: (n, M) float64 in [0, 1); number [i, t] decides token t of sentence i. M is `restricted.max_tokens`.

    Returns:
        (n, M) int64 columns of `restricted`; `restricted.end` from a sentence's end on.
    """
    number, length = uniform.shape
    device = restricted.device
    draws = torch.as_tensor(uniform, device=device)
    tokens = torch.full((number, length), restricted.end, device=device)
    alive = torch.arange(number, device=device)
    fed = torch.full((number, 1), restricted.start_id, device=device)
    cache = None
    for position in range(length):
        mask = torch.ones((len(alive), position + 1), dtype=torch.int64, device=device)
        output = restricted.model(input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.get("past_key_values")
        if cache is None:
            raise InputError(causal_lm.NO_CACHE)
        log_p = restricted.log_probabilities(output.logits[:, -1], first=position == 0)  # (alive, V + 1)
        columns = invert(log_p.double().exp(), draws[alive, position])
        tokens[alive, position] = columns
        unfinished = (columns != restricted.end).nonzero()[:, 0]
        if not len(unfinished):
            break
        if len(unfinished) < len(alive):
            alive = alive[unfinished]
            columns = columns[unfinished]
            cache.batch_select_indices(unfinished)
        fed = restricted.ids(columns)[:, None]
    return tokens.cpu().numpy()


def invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first column, (n,) int64, up to which probabilities (n, W) add up to more than `uniform` (n,) times their sum.

    All are float64, `uniform` in [0, 1). A column of probability 0 is never the first.

    >>> invert(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 4).double(), torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53]).double())
    tensor([1, 1, 3, 3])
    """
    cumulative = probabilities.cumsum(dim=1)
    total = cumulative[:, -1]
    # The product may be rounded up to the total itself, which no sum exceeds.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def sample_batches(restricted: RestrictedLM, batch_size: int, sentences: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield `sample` of `sentences` sentences, `batch_size` at a time."""
    for first in range(0, sentences, batch_size):
        end_if_asked()
        yield sample(restricted, rng.random((min(batch_size, sentences - first), restricted.max_tokens)))


def count_tokens(
    model: "PreTrainedModel", start_id: int, end_id: int, max_tokens: int, seed: int, sentences: int, batch_size: int, jobs: int
) -> np.ndarray:
    """(vocabulary,) int64: occurrences of each token in non-empty sentences of the unrestricted model; 0 for the end token."""
    size = model.config.vocab_size
    columns = [token for token in range(size) if token != end_id]
    unrestricted = RestrictedLM(model, columns, start_id, end_id, max_tokens)

    def count(number: int) -> np.ndarray:
        """Occurrences of each column in the sentences of job `number`."""
        rng = keyed_rng(seed, "language-model-frequencies", number)
        job_sentences = min(SENTENCES_PER_COUNT, sentences - number * SENTENCES_PER_COUNT)
        batches = sample_batches(unrestricted, batch_size, job_sentences, rng)
        return np.sum([np.bincount(batch.ravel(), minlength=size)[:-1] for batch in batches], axis=0)

    counts = np.zeros(size, dtype=np.int64)
    numbers = list(range(math.ceil(sentences / SENTENCES_PER_COUNT)))
    with contextlib.closing(run_jobs(count, numbers, jobs, "token frequencies", "threads")) as results:
        for _, job_counts in results:
            counts[columns] += job_counts
    return counts


def choose_tokens(counts: np.ndarray, tokens: dict[int, bytes], number: int, end_id: int) -> tuple[list[int], list[str]]:
    """The ids and the pieces of the `number` most frequent tokens that can be words of the data, ties by id.

    `counts`, (vocabulary,), are of all tokens of the model; `tokens` has the bytes of the tokenizer's, which may be more, by id
    without the special ones.
    """
    ids: dict[bytes, int] = {}
    for index in np.argsort(-counts, kind="stable").tolist():
        token = tokens.get(index)
        if index != end_id and token is not None and not why_excluded(token):
            ids.setdefault(token, index)
    if number > len(ids):
        raise InputError(
            f"--top-tokens {number}: the model has {len(ids):,} tokens that can be words (of {len(counts):,}; excluded are "
            f"special tokens, those with line breaks and duplicates of the same bytes); give {len(ids)} or fewer"
        )
    return list(ids.values())[:number], [escape(token) for token in ids][:number]


def draw_text(
    restricted: RestrictedLM, pieces: list[str], batch_size: int, sentences: int, rng: np.random.Generator
) -> Iterator[tuple[bytes, int]]:
    """Yield text, an empty line between two sentences, and its number of words, one batch at a time; pieces: (V,)."""
    for tokens in sample_batches(restricted, batch_size, sentences, rng):
        lengths = (tokens != restricted.end).sum(axis=1)
        rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
        lines = (" ".join([pieces[column] for column in row[:length]]) for row, length in rows)
        yield ("\n\n".join(lines) + "\n").encode(), int(lengths.sum())


def make_shard(draw: Callable, folder: Path, seed: int, batch_size: int, progress: Callable, shard: Shard) -> dict:
    """Sample and write one shard; returns its entry in the manifest. `progress` gets the number of sentences per batch."""

    def blocks() -> Iterator[tuple[bytes, int]]:
        for text, words in draw(shard.sentences, keyed_rng(seed, f"language-model-{shard.split}", shard.number)):
            progress(text.count(b"\n\n") + 1)
            yield text, words

    return {**shard.write(folder, blocks()), "batch_size": batch_size}


class Language:
    """The language that the command line asks for: model, kept tokens, device and dtype."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = causal_lm.find_device(options.device)
        is_fast = self.device == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = options.dtype or ("bfloat16" if is_fast else "float32")
        options.batch_size = options.batch_size or (8192 if self.device == "cuda" else 256)
        self.jobs = 1 if self.device == "cuda" else min(options.n_processes, os.cpu_count() or 1)
        self.model, self.tokenizer, self.sha256 = causal_lm.load_causal_lm(options.model_name, self.device, DTYPES[self.dtype])
        start_id, end_id = self._special_ids()
        self._ends = {"start_id": start_id, "end_id": end_id, "max_tokens": options.length_limit - 1}
        model_facts = {"format": causal_lm.FORMAT, "model_name": options.model_name, "model_sha256": self.sha256}
        self._facts: dict[str, Any] = model_facts | self._ends
        self.file_restriction = None if options.top_tokens_file is None else self._read_restriction()
        self.top_tokens = len(self.file_restriction.kept) if self.file_restriction else options.top_tokens or 2000
        # Refuse --top-tokens and --length-limit that are too large for the model before anything is sampled.
        self._choose_tokens(np.zeros(self.model.config.vocab_size))
        RestrictedLM(self.model, [0], **self._ends)

    def _special_ids(self) -> tuple[int, int]:
        """The ids of the start token (the tokenizer's bos, else its eos) and of the end token (eos)."""
        name = self.options.model_name
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(f"--model-name {name}: its tokenizer has no end token (eos_token); sentences would never end")
        start = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        size = self.model.config.vocab_size
        if max(start, end) >= size:
            raise InputError(
                f"--model-name {name}: the start or end token of its tokenizer ({start}, {end}) is not among the model's "
                f"{size} tokens; give a folder whose tokenizer belongs to the model"
            )
        return start, end

    def _read_restriction(self) -> Restriction:
        """The first --top-tokens tokens of --top-tokens-file."""
        options = self.options
        number = options.top_tokens
        restriction = causal_lm.read_restriction(options.top_tokens_file)
        causal_lm.check_model(restriction, options.top_tokens_file, options.model_name, self.sha256)
        if number is not None and number > len(restriction.kept):
            raise InputError(
                f"--top-tokens {number}: {options.top_tokens_file} has {len(restriction.kept)}; leave --top-tokens out"
            )
        lists = {name: getattr(restriction, name)[:number] for name in ("kept", "pieces", "counts")}
        return restriction.model_copy(update={**self._facts, **lists})

    def made_from(self) -> dict:
        """What decides the text, for the manifest."""
        options = self.options
        frequencies = {"sentences": options.frequency_sentences, "seed": options.seed}
        if self.file_restriction:
            kept = json.dumps(self.file_restriction.kept).encode()
            frequencies = {"kept_sha256": hashlib.sha256(kept).hexdigest()}
        return {
            "model_sha256": self.sha256,
            "top_tokens": self.top_tokens,
            "frequencies": frequencies,
            "drawing": DRAWING,
            "seed": options.seed,
            "max_words": options.length_limit - 1,
            "sentence_num": options.sentence_num,
            "test_sentence_num": options.test_sentence_num,
            "device": self.device,
            "dtype": self.dtype,
        }

    def _choose_tokens(self, counts: np.ndarray) -> tuple[list[int], list[str]]:
        return choose_tokens(counts, token_bytes(self.tokenizer), self.top_tokens, self._ends["end_id"])

    def restriction(self) -> Restriction:
        """The kept tokens: those of --top-tokens-file, else the most frequent ones of a sample."""
        if self.file_restriction:
            return self.file_restriction
        options = self.options
        sampling = {"seed": options.seed, "sentences": options.frequency_sentences}
        counts = count_tokens(self.model, **self._ends, **sampling, batch_size=options.batch_size, jobs=self.jobs)
        kept, pieces = self._choose_tokens(counts)
        frequencies = counts[kept]
        total = int(counts.sum())
        print(f"top tokens: {len(kept):,} make up {frequencies.sum() / total:.2%} of {total:,} sampled tokens")
        if not frequencies.all():
            print(f"top tokens: {(frequencies == 0).sum():,} of them never occurred; give more --frequency-sentences")
        estimated = {**sampling, "tokens": total, "device": self.device, "dtype": self.dtype, "batch_size": options.batch_size}
        return Restriction(**self._facts, kept=kept, pieces=pieces, counts=frequencies.tolist(), estimated=estimated)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    text = "folder of a causal language model, or its name on the hub (off unless HF_HUB_OFFLINE=0); default facebook/opt-125m"
    files.add_argument("--model-name", default="facebook/opt-125m", help=text)
    add_folder_arguments(files)
    text = "keep the tokens of this top_tokens.json (or of the one in this folder); default: the most frequent of a sample"
    files.add_argument("--top-tokens-file", type=Path, help=text)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--top-tokens", type=positive_int, help="tokens to keep; default 2000, or all of --top-tokens-file")
    text = "sentences of the unrestricted model from which the frequencies of its tokens are estimated; default 20000"
    sizes.add_argument("--frequency-sentences", type=positive_int, default=20_000, help=text)
    add_shard_arguments(sizes, length_limit=24)
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=non_negative_int, default=0, help="seed of all random numbers; default 0")
    running.add_argument("--batch-size", type=positive_int, help="sentences per batch; default 256, on cuda 8192")
    running.add_argument("--device", choices=("cpu", "cuda"), help="where the model runs; default: cuda if available")
    text = "number format of the model's arithmetic; default: bfloat16 on a cuda device that supports it, else float32"
    running.add_argument("--dtype", choices=DTYPES, help=text)
    add_processes_argument(running)


def write_tokens(restriction: Restriction, text: TextFolder) -> None:
    """Write vocab.txt, the tokenizer and, when both are complete, top_tokens.json."""
    folder = text.folder
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *restriction.pieces])
    text.write_vocabulary(("\n".join(vocabulary.words) + "\n").encode())
    with atomic_folder(folder / OWN_TOKENIZER) as temporary:
        max_length = restriction.max_tokens + 2  # with [CLS] and [SEP]
        write_tokenizer(temporary, build_tokenizer(vocabulary), vocabulary, max_length, OWN_TOKENIZER)
    write_schema(folder / causal_lm.TOP_TOKENS, restriction)
    for name in TOKEN_FILES[1:]:
        text.manifest.add(name)


def generate(options: argparse.Namespace) -> None:
    """Write the text that the command line asks for."""
    shards = list_shards(options)
    # Shards are sampled in threads, each on one core, so that the number of cores does not change a sum.
    torch.set_num_threads(1)
    language = Language(options)
    folder = options.save_path
    text = TextFolder(folder, language.made_from(), shards, options.overwrite)
    if not options.overwrite and not text.manifest.names():
        for path in (folder / OWN_TOKENIZER, folder / causal_lm.TOP_TOKENS):
            if path.exists():
                raise InputError(f"{path}: not of this script; give another --save-path, or --overwrite to replace it")
    try:
        if all(map(text.manifest.is_complete, TOKEN_FILES)):
            restriction = causal_lm.read_restriction(folder)
        else:
            restriction = language.restriction()
            write_tokens(restriction, text)
        restricted = RestrictedLM.of(language.model, restriction)
        draw = functools.partial(draw_text, restricted, restriction.pieces, options.batch_size)
        if text.missing_shards:
            batch, _ = next(draw(options.batch_size, keyed_rng(options.seed, "language-model-plan")))
            description = f"sentences of at most {restricted.max_tokens} of {len(restriction.pieces):,} pieces"
            text.check_disk((len(batch) + 1) / options.batch_size, description)
        sentences = sum(shard.sentences for shard in text.missing_shards)
        with tqdm(total=sentences, desc="sentences", unit="", unit_scale=True, position=1, disable=not sentences) as progress:
            write = functools.partial(make_shard, draw, folder, options.seed, options.batch_size, progress.update)
            text.write_shards(write, n_processes=language.jobs, executor="threads")
    except torch.OutOfMemoryError as error:
        message = f"--batch-size {options.batch_size}: not enough memory on {language.device}; give a smaller one"
        raise InputError(message) from error
