"""Linear probe: a linear classifier on frozen features of a sentence, which are computed once.

The features are the vectors of all positions, concatenated, with zeros at padding (Liu et al. 2023, section 3: "concatenation
of the token representations"):

    hidden       [h_0; h_1; ...; h_{T+1}; 0; ...]          max_seq_length x hidden numbers
    conditional  [p(. | x_-1); ...; p(. | x_-T); 0; ...]   max_words x words numbers

h are the last hidden states ([CLS] and [SEP] included), p the distribution of the word at a position given the rest: the
prediction of a model (softmax over its vocabulary), or the conditionals of the language itself (a lookup table). `pool` is
"concat", or "mean" (over the positions that are not padding), or "cls" (h_0 alone). The solvers are in
`pretraining.evaluation.solvers`.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainingArguments

from pcfg.common.files import InputError, read_json, write_json
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.data.contexts import Contexts, concatenate
from pretraining.data.masking import check_lengths
from pretraining.data.tasks import Task, encode_task
from pretraining.evaluation.downstream import (
    HARMLESS,
    TRAINING_FLAGS,
    DownstreamArguments,
    DownstreamTrainingArguments,
    flag,
    measure_accuracy,
    plain_flags,
)
from pretraining.evaluation.records import ProbeRecord
from pretraining.evaluation.solvers import (
    SOLVERS,
    ProbeData,
    accuracy,
    bootstrap,
    choose_strength,
    correct,
    fit_adamw,
    fit_lbfgs,
    standardise,
)
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import FACTS_FILE, describe_model, is_model_folder, load_model

FEATURES = ("hidden", "conditional")
POOLS = ("concat", "mean", "cls")
LOOKUP_TABLE = "lookup table"  # the name in args.json by which the report knows it
BLOCK_SENTENCES = 512  # of a lookup table in memory at a time
# Per encoder pass: more do not fit into the cache of a CPU (20% slower at 32,768), and a GPU needs more.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
# The training flags that AdamW depends on; the other TrainingArguments configure the Trainer, which a probe does not use.
FLAGS = (*TRAINING_FLAGS, "lr_scheduler_kwargs", "eval_strategy", "eval_steps")


@dataclasses.dataclass(kw_only=True)
class ProbeArguments(DownstreamArguments):
    """Features and solver of a probe, in addition to model and data."""

    features: str = flag(
        default="hidden",
        metadata={"choices": FEATURES},
        help="hidden: last hidden states; conditional: the distribution of the word at each position given the rest, predicted "
        "by a model or, with --rule-path or --condprobfile_*, of the language itself (the lookup table)",
    )
    pool: str = flag(
        default="concat",
        metadata={"choices": POOLS},
        help="concat: the vectors of all positions; mean: their mean over the sentence, without padding; cls: that of [CLS]",
    )
    solver: str = flag(
        default="adamw",
        metadata={"choices": SOLVERS},
        help="adamw: trained with the training flags; lbfgs: the regularised optimum, which ignores them",
    )
    bootstrap: int = flag(default=0, help="resampled data sets for the error over samples of the data, 2 or more; 0: none")
    rule_path: str | None = flag(default=None, help="grammar whose conditionals are probed; a bare name may be a shipped one")
    condprobfile_train: str | None = flag(
        default=None, help="lookup table made for --train_file by python -m pcfg.lookup, instead of --rule-path"
    )
    condprobfile_validation: str | None = flag(default=None, help="lookup table made for --validation_file")


def _allocate(rows: int, width: int) -> Tensor:
    """Zeros of shape (rows, width), float32, if they fit into memory."""
    needed = 4 * rows * width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"the features of {rows:,} sentences need {needed / 2**30:.1f} GiB, the machine has {memory / 2**30:.1f} GiB; "
            "use fewer sentences, a smaller --max_seq_length or a smaller vocabulary"
        )
    with torch.inference_mode(False):  # an inference tensor could not be trained on
        return torch.zeros(rows, width)


def feature_width(pool: str, positions: int, size: int) -> int:
    """Numbers of one sentence's features: `positions` vectors of `size`, or one of them."""
    return positions * size if pool == "concat" else size


def _pooled(vectors: Tensor, pool: str, positions: int) -> Tensor:
    """(batch, length, size) vectors of sentences without padding -> (batch, feature_width(pool, positions, size))."""
    if pool == "mean":
        return vectors.mean(1)
    return vectors[:, 0] if pool == "cls" else concatenate(vectors, None, positions)


@torch.inference_mode()
def hidden_features(
    model: MaskedLM, contexts: Contexts, positions: int, pool: str = "concat", batch_tokens: int | None = None
) -> Tensor:
    """Last hidden states of whole (unmasked) sentences.

    A batch has sentences of one length, so that nothing is padded or masked; repeated sentences are computed once. All is
    float32: bfloat16, with its 8 bits, changes the accuracy of a probe.

    Args:
        contexts: the sentences; only their `input_ids` and `lengths` are used.
        positions: of the concatenated features, at least the longest length.
        batch_tokens: tokens per batch, approximately; None for the default of the device.

    Returns:
        (sentences, feature_width(pool, positions, hidden)) float32, on the CPU.
    """
    width = feature_width(pool, positions, model.config.hidden_size)
    features = _allocate(len(contexts.lengths), width)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or BATCH_TOKENS[device.type]
    with tqdm(total=len(features), desc="features", unit="sentence", leave=False) as progress:
        for length in np.unique(contexts.lengths).tolist():
            rows = np.flatnonzero(contexts.lengths == length)
            distinct, inverse = np.unique(contexts.input_ids[rows, :length], axis=0, return_inverse=True)
            sentences = torch.from_numpy(distinct).split(max(1, batch_tokens // length))
            encoded = [_pooled(model.encode(ids.to(device)), pool, positions).float().cpu() for ids in sentences]
            features[torch.from_numpy(rows)] = torch.cat(encoded)[torch.from_numpy(inverse.ravel())]
            progress.update(len(rows))
    return features


def _put(features: Tensor, sentence: np.ndarray, word: np.ndarray, vectors: Tensor, counts: np.ndarray, pool: str) -> None:
    """Put the vectors (m, size) of words (m,) of sentences (m,) into their features; `counts` (sentences,) are of words."""
    rows = torch.from_numpy(sentence)
    if pool == "concat":
        features.view(len(features), -1, vectors.shape[1])[rows, torch.from_numpy(word)] = vectors
    else:
        features.index_add_(0, rows, vectors / torch.from_numpy(counts[sentence])[:, None])


@torch.inference_mode()
def conditional_features(
    model: MaskedLM, contexts: Contexts, max_words: int, pool: str = "concat", batch_size: int = 512
) -> Tensor:
    """Conditionals f(x_-t) that a model predicts at every word position t, over its whole vocabulary; concatenated or the mean.

    Returns:
        (sentences, feature_width(pool, max_words, vocab_size)) float32, on the CPU; zeros beyond the end of a sentence.
    """
    features = _allocate(len(contexts.lengths), feature_width(pool, max_words, model.config.vocab_size))
    device = next(model.parameters()).device
    counts = contexts.counts
    batches = contexts.batches(np.arange(len(contexts.label)), batch_size)
    for batch in tqdm(batches, desc="conditionals", unit="batch", leave=False):
        probabilities = torch.softmax(model(*contexts.batch(batch, device)).float(), -1).cpu()  # (m, vocab_size)
        word = contexts.position[batch] - 1  # position 0 is [CLS]
        _put(features, contexts.sentence[batch], word, probabilities, counts, pool)
    return features


def table_features(table: LookupTable, max_words: int, pool: str = "concat", sentences: int | None = None) -> Tensor:
    """The true conditionals P(. | x_-t) of the first `sentences` of a lookup table (None: all); concatenated or the mean.

    Returns:
        (sentences, feature_width(pool, max_words, words)) float32; zeros beyond the end of a sentence.
    """
    lengths = np.asarray(table.lengths[:sentences], np.int64)
    features = _allocate(len(lengths), feature_width(pool, max_words, len(table.words)))
    for low in range(0, len(lengths), BLOCK_SENTENCES):
        high = min(low + BLOCK_SENTENCES, len(lengths))
        sentence, word = np.nonzero(np.arange(max_words) < lengths[low:high, None])
        rows = torch.from_numpy(np.asarray(table.conditionals(low, high), np.float32))
        _put(features, sentence + low, word, rows, lengths, pool)
    return features


def ineffective_flags(changed: dict[str, Any], solver: str) -> list[str]:
    """The training flags in `changed` that a probe by `solver` ignores."""
    return sorted(changed.keys() - set(FLAGS if solver == "adamw" else ()) - HARMLESS - {"use_cpu"})


def fit(
    data: ProbeData, options: ProbeArguments, training: TrainingArguments, seeds: list[int]
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Fit the probe once per seed, and to resampled sentences for --bootstrap; returns as `run` of `measure_accuracy`."""
    fields: dict[str, Any] = {}
    if options.solver == "lbfgs":
        standardise(data)
        # The optimum at the strength that each seed's split chooses.
        strengths = [choose_strength(data.features, data.labels, data.classes, seed) for seed in seeds]
        optima = {strength: fit_lbfgs(data.features, data.labels, data.classes, strength) for strength in set(strengths)}
        heads = [optima[strength].head for strength in strengths]
        bests = [0.0] * len(heads)
        fields = {"strengths": strengths, "excess_nats": max(optimum.excess for optimum in optima.values())}

        def refit(sentences: np.ndarray) -> nn.Linear:
            weights = torch.from_numpy(np.bincount(sentences, minlength=len(data.labels))).to(data.features)
            start = optima[strengths[0]]
            return fit_lbfgs(data.features, data.labels, data.classes, strengths[0], weights=weights, start=start).head

    else:
        fits = [fit_adamw(data, training, seed) for seed in seeds]
        heads = [head for head, _ in fits]
        bests = [best for _, best in fits]

        def refit(sentences: np.ndarray) -> nn.Linear:
            return fit_adamw(data, training, seeds[0], sentences)[0]

    matches = [correct(head, data.validation_features, data.validation_labels).numpy() for head in heads]
    runs = []
    for head, best, match in zip(heads, bests, matches, strict=True):
        last = int(match.sum()) / len(match)
        runs.append({"last": last, "best": max(best, last), "train": accuracy(head, data.features, data.labels)})
    if options.bootstrap:
        fields["bootstrap"] = bootstrap(data, np.mean(matches, axis=0), refit, options.bootstrap, seeds[0])
    return runs, fields


def _measure(
    folder: Path,
    model: dict[str, str],
    task: Task,
    options: ProbeArguments,
    training: TrainingArguments,
    compute_features: Callable[[], tuple[list[Tensor], int]],
) -> None:
    """Fit the probe, and write the record; `compute_features` gives those of both parts, and their full width.

    The record is `probe_TASK.json`, with choices that are not the defaults before the task: features, solver, pooling.
    """
    features = "hidden" if model.get("name") == LOOKUP_TABLE else options.features  # a table has one kind of features only
    choices = (features, "hidden"), (options.solver, "adamw"), (options.pool, "concat")
    name = "_".join(["probe", *(choice for choice, default in choices if choice != default), task.name]) + ".json"
    own = {option: getattr(options, option) for option in ("features", "pool", "solver", "bootstrap")}
    flags = plain_flags(training, FLAGS) if options.solver == "adamw" else {}

    def run(seeds: list[int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
        features, width = compute_features()
        labels = [torch.from_numpy(part.labels) for part in (task.train, task.validation)]
        train, validation, *labels = _placed(training.device, *features, *labels)
        data = ProbeData(train, labels[0], validation, labels[1], len(task.classes), width)
        runs, fields = fit(data, options, training, seeds)
        return runs, {"features": options.features, **fields}

    measure_accuracy(folder, name, ProbeRecord, task, options, training, model, {**flags, **own}, run)


def _placed(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a GPU if they fit into half of its free memory; otherwise unchanged."""
    if device.type != "cuda" or 2 * sum(tensor.nbytes for tensor in tensors) > torch.cuda.mem_get_info(device)[0]:
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


def probe_model(folder: Path, task: Task, options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Probe the model in `folder`: its hidden states, or its predicted conditionals (`options.features`)."""

    def compute_features() -> tuple[list[Tensor], int]:
        model = load_model(folder, training.device)
        parts = encode_task(task, folder, model.config, options)
        longest = max(int(part.lengths.max()) for part in parts)  # beyond it all features are zeros
        if options.features == "hidden":
            features = [hidden_features(model, part, longest, options.pool) for part in parts]
            return features, feature_width(options.pool, options.max_seq_length, model.config.hidden_size)
        features = [conditional_features(model, part, longest - 2, options.pool) for part in parts]
        return features, feature_width(options.pool, options.max_seq_length - 2, model.config.vocab_size)

    _measure(folder, describe_model(folder), task, options, training, compute_features)


def probe_lookup_table(task: Task, options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Probe the true conditionals of the task's sentences; the record goes into --output_dir, a folder without weights."""
    grammar_sha256, open_tables = _tables(task, options)
    folder = _record_folder(str(training.record_folder), grammar_sha256)

    def compute_features() -> tuple[list[Tensor], int]:
        pairs = list(zip(open_tables(), (task.train, task.validation), strict=True))
        lengths = [np.asarray(table.lengths[: len(part)]) for table, part in pairs]
        for words, (_, part) in zip(lengths, pairs, strict=True):
            check_lengths(words, options.max_seq_length, part.file)
        longest = max(int(words.max()) for words in lengths)
        features = [table_features(table, longest, options.pool, len(part)) for table, part in pairs]
        return features, feature_width(options.pool, options.max_seq_length - 2, len(pairs[0][0].words))

    model = {"name": LOOKUP_TABLE, "grammar_sha256": grammar_sha256}
    _measure(folder, model, task, options, training, compute_features)


def _tables(task: Task, options: ProbeArguments) -> tuple[str, Callable[[], list[LookupTable]]]:
    """The SHA-256 of the grammar, and a function that returns the lookup tables of both parts of the task."""
    parts = (task.train, task.validation)
    if options.rule_path is not None:
        grammar = Grammar.read(find_rules(options.rule_path))
        return grammar.sha256, lambda: [LookupTable.compute(grammar, part.texts, part.file) for part in parts]
    files = [str(options.condprobfile_train), str(options.condprobfile_validation)]
    tables = [LookupTable.open(file) for file in files]
    for table, part in zip(tables, parts, strict=True):
        table.check_text(part.file)
        table.check_whole(len(part))
    if tables[0].grammar_sha256 != tables[1].grammar_sha256:
        raise InputError(f"{files[0]} and {files[1]}: made from two grammars; make both with the same --rule-path")
    return tables[0].grammar_sha256, lambda: tables


def _record_folder(output_dir: str, grammar_sha256: str) -> Path:
    """The folder of the lookup table's records, with an `args.json` that identifies it."""
    folder = Path(output_dir)
    if is_model_folder(folder):
        raise InputError(f"--output_dir {folder}: holds a model; give the records of the lookup table another folder")
    facts = {"model": LOOKUP_TABLE, "grammar_sha256": grammar_sha256}
    path = folder / FACTS_FILE
    if not path.exists():
        write_json(path, facts)
    elif read_json(path) != facts:
        raise InputError(f"{path}: belongs to another model or grammar; give another --output_dir")
    return folder
