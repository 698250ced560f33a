"""Linear probe: a linear classifier on frozen features of a sentence, which are computed once.

The features are in `pretraining.evaluation.features`, the solvers in `pretraining.evaluation.solvers`.

A curve is the accuracy by the number of labelled sentences: the mean over draws from the training file. A draw is a function of
the file's SHA-256, the number of labels and the number of the draw. So it is the same for every model and for all features.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from pcfg.common.cli import Progress
from pcfg.common.files import InputError, keyed_rng, read_json, write_json
from pcfg.common.ranks import use_threads
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.data.masking import check_lengths
from pretraining.data.tasks import Task, encode_task
from pretraining.evaluation import downstream, features, solvers
from pretraining.evaluation.downstream import DownstreamArguments, DownstreamTrainingArguments, flag
from pretraining.evaluation.features import FEATURES, POOLS, Pool, check_position, feature_width
from pretraining.evaluation.records import CurvePoint, CurveRecord, Mean, ProbeRecord, is_measured, write_record
from pretraining.evaluation.solvers import ProbeData
from pretraining.model.checkpoints import FACTS_FILE, describe_model, is_model_folder, load_model

LOOKUP_TABLE = "lookup table"  # the name in args.json by which the report knows it
WORDS = "words"  # the same of one-hot words
CHOICE_DRAWS = 5  # draws per number of labels on which the strength of L-BFGS is chosen
# The training flags that AdamW depends on; the other TrainingArguments configure the Trainer, which a probe does not use.
FLAGS = (*downstream.TRAINING_FLAGS, "lr_scheduler_kwargs", "eval_strategy", "eval_steps")


@dataclasses.dataclass(kw_only=True)
class ProbeArguments(DownstreamArguments):
    """Features and solver of a probe, in addition to model and data."""

    features: str = flag(
        default="hidden",
        metadata={"choices": FEATURES},
        help="hidden: hidden states of a model; conditional: the distribution of the word at each position given the rest, "
        "predicted by a model or, with --rule-path or --condprobfile_*, of the language itself (the lookup table); words: "
        "one-hot words, without a model",
    )
    pool: str = flag(
        default="concat",
        metadata={"choices": POOLS},
        help="concat: the vectors of all positions; mean: their mean over the sentence, without padding; cls: that of [CLS]",
    )
    layer: int | None = flag(
        default=None, help="number of layers before the hidden states; 0: embeddings; default: all, and the final LayerNorm"
    )
    position: int | None = flag(default=None, help="read the word at this position alone, from 1; default: all, by --pool")
    solver: str | None = flag(
        default=None,
        metadata={"choices": solvers.SOLVERS},
        help="adamw: trained with the training flags; lbfgs, ridge: the regularised optimum of the cross-entropy or of the "
        "squared error, which ignores them; default: adamw for hidden states, lbfgs for conditional and words",
    )
    label_counts: str | None = flag(
        default=None, help="accuracy by the number of labelled sentences, such as 50,100,300,1000; with lbfgs or ridge"
    )
    label_draws: int = flag(default=20, help="labelled sets per number, drawn from --train_file; 2 or more")
    bootstrap: int = flag(default=0, help="resampled data sets for the error over samples of the data, 2 or more; 0: none")
    rule_path: str | None = flag(default=None, help="grammar whose conditionals are probed; a bare name may be a shipped one")
    condprobfile_train: str | None = flag(
        default=None, help="lookup table made for --train_file by python -m pcfg.lookup, instead of --rule-path"
    )
    condprobfile_validation: str | None = flag(default=None, help="lookup table made for --validation_file")

    @property
    def pooling(self) -> Pool:
        return self.pool if self.position is None else self.position

    @property
    def needs_model(self) -> bool:
        """Whether neither a lookup table nor one-hot words are probed."""
        tables = (self.rule_path, self.condprobfile_train, self.condprobfile_validation)
        return self.features != "words" and not any(tables)

    @property
    def method(self) -> str:
        """The solver, with the default of the features."""
        return self.solver or ("adamw" if self.features == "hidden" else "lbfgs")


def ineffective_flags(changed: dict[str, Any], options: ProbeArguments) -> set[str]:
    """The training flags in `changed`, and the other flags, that the probe ignores."""
    ignored = changed.keys() - set(FLAGS if options.method == "adamw" else ()) - downstream.HARMLESS - {"use_cpu"}
    if "seed" in changed and (options.seeds is not None or options.method == "ridge" or options.label_counts is not None):
        ignored |= {"seed"}
    if options.needs_model and "output_dir" in changed:
        ignored |= {"output_dir"}
    if options.label_counts is None and options.label_draws != ProbeArguments.label_draws:
        ignored |= {"label_draws"}
    return ignored


def fit(
    data: ProbeData, options: ProbeArguments, training: TrainingArguments, seeds: list[int]
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Fit the probe once per seed, and to resampled sentences for --bootstrap; returns as `run` of `measure_accuracy`."""
    fields: dict[str, Any] = {}
    bests = [0.0] * len(seeds)
    if options.method == "ridge":
        ridge = solvers.fit_ridge(data.features, data.labels, data.classes)
        heads = [ridge.head]
        fields = {"strengths": [ridge.strength]}

        def refit(sentences: np.ndarray) -> nn.Linear:
            rows = torch.from_numpy(sentences).to(data.features.device)
            return solvers.fit_ridge(data.features[rows], data.labels[rows], data.classes, (ridge.strength,)).head

    elif options.method == "lbfgs":
        solvers.standardise(data)
        # The optimum at the strength that each seed's split chooses.
        strengths = [solvers.choose_strength([(data.features, data.labels)], data.classes, seed) for seed in seeds]
        part = (data.features, data.labels, data.classes)
        optima = {strength: solvers.fit_lbfgs(*part, strength) for strength in set(strengths)}
        heads = [optima[strength].head for strength in strengths]
        fields = {"strengths": strengths, "excess_nats": max(optimum.excess for optimum in optima.values())}

        def refit(sentences: np.ndarray) -> nn.Linear:
            weights = torch.from_numpy(np.bincount(sentences, minlength=len(data.labels))).to(data.features)
            start = optima[strengths[0]]
            return solvers.fit_lbfgs(*part, strengths[0], weights=weights, start=start).head

    else:
        fits = [solvers.fit_adamw(data, training, seed) for seed in seeds]
        heads = [head for head, _ in fits]
        bests = [best for _, best in fits]
        progress = [solvers.progress_left(head, data, training, seed) for head, seed in zip(heads, seeds, strict=True)]
        unfinished = [fall for _, fall in progress if fall > solvers.STILL_FALLS]
        if unfinished:
            print(
                f"warning: the training loss still falls, by {max(unfinished):.3f} nats in a few more steps ({len(unfinished)} "
                f"of {len(seeds)} seeds); this accuracy is of an unfinished probe: give more --num_train_epochs, a larger "
                "--learning_rate, or --solver ridge or lbfgs"
            )
        fields = {"gradient_norms": [norm for norm, _ in progress], "unfinished": len(unfinished)}

        def refit(sentences: np.ndarray) -> nn.Linear:
            return solvers.fit_adamw(data, training, seeds[0], sentences)[0]

    matches = [solvers.correct(head, data.validation_features, data.validation_labels).numpy() for head in heads]
    runs = []
    for head, best, match in zip(heads, bests, matches, strict=True):
        last = int(match.sum()) / len(match)
        runs.append({"last": last, "best": max(best, last), "train": solvers.accuracy(head, data.features, data.labels)})
    if options.bootstrap:
        fields["bootstrap"] = solvers.bootstrap(data, np.mean(matches, axis=0), refit, options.bootstrap, seeds[0])
    return runs, fields


def label_draws(sha256: str, sentences: int, labels: int, draws: int) -> list[np.ndarray]:
    """`draws` sets of `labels` of the first `sentences` sentences of a training file, each (labels,) int64."""
    key = int(sha256[:16], 16)
    return [keyed_rng(0, "label-draw", key, labels, draw).permutation(sentences)[:labels] for draw in range(draws)]


def fit_draws(data: ProbeData, solver: str, draws: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Fit the probe to each set of training sentences.

    The strength is chosen per draw (ridge), or once on the held-out fifths of the first `CHOICE_DRAWS` draws (lbfgs). Fits of
    lbfgs end within `ROUGH` nats of the minimum: far less than draws differ.

    Returns:
        (draws, validation sentences) bool, which of them are right; and the strengths.
    """
    parts = [torch.from_numpy(draw).to(data.features.device) for draw in draws]
    matches = []
    if solver == "ridge":
        fits = [solvers.fit_ridge(data.features[rows], data.labels[rows], data.classes) for rows in parts]
        matches = [solvers.correct(fit.head, data.validation_features, data.validation_labels).numpy() for fit in fits]
        return np.stack(matches), [fit.strength for fit in fits]

    def standardised(rows: Tensor, validation: Tensor) -> ProbeData:
        part = dataclasses.replace(
            data, features=data.features[rows], labels=data.labels[rows], validation_features=validation.clone()
        )
        solvers.standardise(part)
        return part

    samples = [standardised(rows, data.validation_features[:0]) for rows in parts[:CHOICE_DRAWS]]
    strength = solvers.choose_strength([(sample.features, sample.labels) for sample in samples], data.classes, 0)
    for rows in parts:
        part = standardised(rows, data.validation_features)
        head = solvers.fit_lbfgs(part.features, part.labels, data.classes, strength, solvers.ROUGH).head
        matches.append(solvers.correct(head, part.validation_features, data.validation_labels).numpy())
    return np.stack(matches), [strength]


def curve_point(data: ProbeData, solver: str, draws: list[np.ndarray]) -> CurvePoint:
    """The accuracy of the probes of all draws, with its errors."""
    matches, strengths = fit_draws(data, solver, draws)
    accuracies = matches.mean(1)
    by_sentence = matches.mean(0)
    labels = data.labels.cpu().numpy()
    return CurvePoint(
        labels=len(draws[0]),
        draws=len(draws),
        accuracy=Mean(mean=float(accuracies.mean()), standard_error=float(accuracies.std(ddof=1) / len(draws) ** 0.5)),
        missing_classes=sum(len(np.unique(labels[draw])) < data.classes for draw in draws),
        sampling_standard_error=float(by_sentence.std() / len(by_sentence) ** 0.5),
        strengths=strengths,
    )


def _measure(
    folder: Path,
    model: dict[str, str] | None,
    task: Task,
    options: ProbeArguments,
    training: TrainingArguments,
    compute_features: Callable[[], tuple[list[Tensor], int]],
) -> None:
    """Fit the probe, and write the record; `compute_features` gives those of both parts, and their full width.

    The record is `probe_TASK.json` or `curve_TASK_SOLVER.json`. Choices that are not the defaults stand before the task:
    features, solver (of a probe), pooling, layer and position.
    """
    kind = options.features if options.needs_model else "hidden"  # a control has one kind of features only
    is_curve = options.label_counts is not None
    choices = (
        (kind, kind != "hidden"),
        (options.method, options.method != "adamw" and not is_curve),
        (options.pool, options.pool != "concat"),
        (f"layer{options.layer}", options.layer is not None),
        (f"position{options.position}", options.position is not None),
    )
    middle = [*(choice for choice, is_named in choices if is_named), task.name]
    own: dict[str, Any] = {option: getattr(options, option) for option in ("features", "pool", "bootstrap")}
    own |= {name: value for name in ("layer", "position") if (value := getattr(options, name)) is not None}
    own["solver"] = options.method
    flags = downstream.plain_flags(training, FLAGS) if options.method == "adamw" else {}
    if flags:
        downstream.training_steps(training, len(task.train))  # refuses a warm-up longer than the training

    def prepare() -> ProbeData:
        vectors, width = compute_features()
        for rows, part in zip(vectors, task.parts(), strict=False):
            if not rows.isfinite().all():
                raise InputError(f"{folder}: features of {part.file} are not finite; the model's hidden states overflow")
        labels = [torch.from_numpy(part.labels) for part in (task.train, task.validation)]
        train, validation, *labels = _placed(training.device, *vectors, *labels)
        return ProbeData(train, labels[0], validation, labels[1], len(task.classes), width)

    def run(seeds: list[int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
        runs, fields = fit(prepare(), options, training, seeds)
        return runs, {"features": options.features, **fields}

    if is_curve:
        name = "_".join(["curve", *middle, options.method]) + ".json"
        _measure_curve(folder, name, task, options, training, model, own, prepare)
    else:
        name = "_".join(["probe", *middle]) + ".json"
        downstream.measure_accuracy(folder, name, ProbeRecord, task, options, training, model, {**flags, **own}, run)


def _measure_curve(
    folder: Path,
    name: str,
    task: Task,
    options: ProbeArguments,
    training: TrainingArguments,
    model: dict[str, str] | None,
    own: dict[str, Any],
    prepare: Callable[[], ProbeData],
) -> None:
    """Measure the accuracy for each of --label-counts and write record `name`, unless it is complete."""
    counts = sorted(downstream.parse_integers("label_counts", options.label_counts or "", 2, len(task.train)))
    inputs, data_flags = downstream.record_inputs(task, options, model)
    arguments = {**own, **data_flags, "label_counts": counts, "label_draws": options.label_draws}
    if is_measured(folder, name, inputs, arguments, options.overwrite):
        print(f"{folder}: {name} is measured already, skipped (--overwrite measures again)")
        return
    started = time.monotonic()
    data = prepare()
    sha256 = inputs["train"]["sha256"]
    sets = [label_draws(sha256, len(task.train), labels, options.label_draws) for labels in counts]
    points = [curve_point(data, options.method, draws) for draws in Progress(sets, desc="label counts", leave=False)]
    most = points[-1].accuracy
    details: dict[str, Any] = {"overlap": task.overlap, "classes": len(task.classes), "train_n": len(task.train)}
    details |= {name: getattr(options, name) for name in ("features", "pool", "layer", "position")}
    record = CurveRecord(
        value=most.mean,
        standard_error=most.standard_error,
        n=len(task.validation),
        unit="accuracy (share of validation sentences)",
        inputs=inputs,
        arguments=arguments,
        seconds=time.monotonic() - started,
        device=str(training.device),
        task=task.name,
        points=points,
        majority=task.majority,
        solver=options.method,
        **details,
    )
    write_record(folder, name, record)
    print(f"{folder}: curve {task.name} by {options.method}: {downstream.describe_curve(record)}")


def _placed(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a GPU if they fit into half of its free memory; otherwise unchanged."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the model has used counts as free
        if 2 * sum(tensor.nbytes for tensor in tensors) <= torch.cuda.mem_get_info(device)[0]:
            return tuple(tensor.to(device) for tensor in tensors)
    return tensors


def probe_model(folder: Path, output: Path, task: Task, options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Probe the model in `folder`: its hidden states, or its predicted conditionals; the record goes into `output`."""

    def compute_features() -> tuple[list[Tensor], int]:
        model = load_model(folder, training.device)
        use_threads(model.config.hidden_size)
        parts = encode_task(task, folder, model.config, options)
        longest = max(int(part.lengths.max()) for part in parts)  # beyond it all features are zeros
        pool = options.pooling
        for part, file in zip(parts, task.parts(), strict=True):
            check_position(pool, part.lengths - 2, file.file)
        if options.features == "hidden":
            vectors = [features.hidden_features(model, part, longest, pool, layer=options.layer) for part in parts]
            return vectors, feature_width(pool, options.max_seq_length, model.config.hidden_size)
        vectors = [features.conditional_features(model, part, longest - 2, pool) for part in parts]
        return vectors, feature_width(pool, options.max_seq_length - 2, model.config.vocab_size)

    _measure(output, describe_model(folder), task, options, training, compute_features)


def probe_words(task: Task, options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Probe the one-hot words of the task's sentences; the record goes into --output_dir, a folder without weights."""
    folder = _record_folder(str(training.record_folder), {"model": WORDS})

    def compute_features() -> tuple[list[Tensor], int]:
        sentences = []
        for part in (task.train, task.validation):
            texts = [" [SEP] ".join(row) for row in zip(part.texts, *([] if part.pairs is None else [part.pairs]), strict=True)]
            # Natural text is cut; other sentences are refused if they are too long.
            words = [text.split()[: options.max_seq_length - 2 if task.pieces else None] for text in texts]
            lengths = np.array([len(row) for row in words])
            check_lengths(lengths, options.max_seq_length, part.file)
            check_position(options.pooling, lengths, part.file)
            sentences.append(words)
        vectors = features.word_features(sentences, options.pooling)
        return vectors, vectors[0].shape[1]

    _measure(folder, None, task, options, training, compute_features)


def probe_lookup_table(task: Task, options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Probe the true conditionals of the task's sentences; the record goes into --output_dir, a folder without weights."""
    grammar_sha256, open_tables = _tables(task, options)
    folder = _record_folder(str(training.record_folder), {"model": LOOKUP_TABLE, "grammar_sha256": grammar_sha256})

    def compute_features() -> tuple[list[Tensor], int]:
        pairs = list(zip(open_tables(), (task.train, task.validation), strict=True))
        lengths = [np.asarray(table.lengths[: len(part)]) for table, part in pairs]
        for words, (_, part) in zip(lengths, pairs, strict=True):
            check_lengths(words, options.max_seq_length, part.file)
            check_position(options.pooling, words, part.file)
        longest = max(int(words.max()) for words in lengths)
        vectors = [features.table_features(table, longest, options.pooling, len(part)) for table, part in pairs]
        return vectors, feature_width(options.pooling, options.max_seq_length - 2, len(pairs[0][0].words))

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


def _record_folder(output_dir: str, facts: dict[str, str]) -> Path:
    """The folder of the records of a control, with an `args.json` that identifies it."""
    folder = Path(output_dir)
    if is_model_folder(folder):
        raise InputError(f"--output_dir {folder}: holds a model; give the records of {facts['model']} another folder")
    path = folder / FACTS_FILE
    if not path.exists():
        write_json(path, facts)
    elif read_json(path) != facts:
        raise InputError(f"{path}: belongs to another model or grammar; give another --output_dir")
    return folder
