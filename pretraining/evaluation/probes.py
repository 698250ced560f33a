"""Linear probe: a linear classifier on frozen features, which are computed once.

Liu et al. 2023, section 3 (linear probe on the concatenated token representations, AdamW). What the features are is told in
`pretraining.evaluation.heads`, what is fitted to them and how in `pretraining.evaluation.solvers`.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from pcfg.common.files import InputError, read_json, write_json
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.data.tasks import Task, check_max_seq_length, encode_task
from pretraining.evaluation.downstream import data_arguments, measure_accuracy, parse_seeds
from pretraining.evaluation.heads import conditional_features, feature_width, hidden_features, table_features
from pretraining.evaluation.solvers import (
    ProbeData,
    accuracy,
    bootstrap,
    choose_strength,
    correct,
    fit_adamw,
    fit_lbfgs,
    standardise,
)
from pretraining.model.checkpoints import FACTS_FILE, describe_model, is_model_folder, load_model

LOOKUP_TABLE = "lookup table"  # the name in args.json by which the report knows it
# The training flags that AdamW depends on here; the rest of TrainingArguments is about the Trainer, which a probe does not use.
FLAGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "eval_strategy", "eval_steps"),
)
# Flags that have no bearing on the result of a probe either way.
HARMLESS = {"per_device_eval_batch_size", "output_dir", "seed", "do_train", "do_eval", "report_to", "disable_tqdm", "use_cpu"}


def ineffective_flags(given: dict, solver: str) -> list[str]:
    """The training flags in `given` that a probe by `solver` does not follow."""
    return sorted(given.keys() - set(FLAGS if solver == "adamw" else ()) - HARMLESS)


def record_name(options, task: Task, is_table: bool = False) -> str:
    """`probe_TASK.json`, with what is not the default before the task: conditional features of a model, lbfgs, the pooling."""
    features = "hidden" if is_table else options.features  # a table has one kind of them only
    choices = (features, "hidden"), (options.solver, "adamw"), (options.pool, "concat")
    return "_".join(["probe", *(choice for choice, default in choices if choice != default), task.name]) + ".json"


def fit(data: ProbeData, options, training: TrainingArguments, seeds: list[int]) -> tuple[list[dict], dict]:
    """Fit the probe once a seed, and to resampled sentences for --bootstrap.

    Returns:
        One dict a seed: "last" and "best" validation accuracy, "train", the accuracy on the training part; and further details
        of the record.
    """
    if options.solver == "lbfgs":
        standardise(data)
        heads, details, refit = _optima(data, seeds)
        bests = [0.0] * len(heads)
    else:
        heads, bests = zip(*(fit_adamw(data, training, seed) for seed in seeds), strict=True)
        details = {}

        def refit(drawn):
            return fit_adamw(data, training, seeds[0], drawn)[0]

    right = [correct(head, data.validation_features, data.validation_labels).numpy() for head in heads]
    runs = []
    for head, best, is_right in zip(heads, bests, right, strict=True):
        last = int(is_right.sum()) / len(is_right)
        runs.append({"last": last, "best": max(best, last), "train": accuracy(head, data.features, data.labels)})
    if options.bootstrap:
        details["bootstrap"] = bootstrap(data, np.mean(right, axis=0), refit, options.bootstrap, seeds[0])
    return runs, details


def _optima(data: ProbeData, seeds: list[int]) -> tuple:
    """Heads: the optimum at the strength that each seed's split chooses; what a record keeps of them; the bootstrap's refit."""
    strengths = [choose_strength(data.features, data.labels, data.classes, seed) for seed in seeds]
    fits = {strength: fit_lbfgs(data.features, data.labels, data.classes, strength) for strength in set(strengths)}
    first = fits[strengths[0]]

    def refit(drawn):
        weights = torch.from_numpy(np.bincount(drawn, minlength=len(data.labels))).to(data.features)
        return fit_lbfgs(data.features, data.labels, data.classes, strengths[0], weights=weights, start=first).head

    details = {"strengths": strengths, "excess_nats": max(optimum.excess for optimum in fits.values())}
    return [fits[strength].head for strength in strengths], details, refit


def _measure(folder: Path, name: str, inputs: dict, task: Task, options, training, features_of_parts) -> dict | None:
    """Fit the probe to what `features_of_parts()` gives (of training and validation, and their width); write the record."""
    flags = {flag: getattr(training, flag) for flag in FLAGS} if options.solver == "adamw" else {}
    plain = {flag: getattr(value, "value", value) for flag, value in flags.items()}  # enums by their value
    seeds = parse_seeds(options, training)
    own = {name: getattr(options, name) for name in ("features", "pool", "solver", "bootstrap")}

    def run(seeds):
        *features, width = features_of_parts()
        labels = [torch.from_numpy(part.labels) for part in (task.train, task.validation)]
        train, validation, *labels = _placed(training.device, *features, *labels)
        return fit(ProbeData(train, labels[0], validation, labels[1], len(task.classes), width), options, training, seeds)

    return measure_accuracy(
        folder,
        name,
        "probe",
        task,
        seeds,
        run,
        features=options.features,
        inputs={**task.inputs(), **inputs},
        arguments={**plain, **own, **data_arguments(options, seeds)},
        device=str(training.device),
        overwrite=options.overwrite,
    )


def _placed(device: torch.device, *tensors: torch.Tensor) -> tuple:
    """The tensors on `device`, where they fit into half of what is free there; else as they are."""
    if device.type != "cuda" or 2 * sum(tensor.nbytes for tensor in tensors) > torch.cuda.mem_get_info(device)[0]:
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


def probe_model(folder: Path, task: Task, options, training: TrainingArguments) -> dict | None:
    """Probe the model in `folder`: its hidden states, or its predicted conditionals (`options.features`).

    Returns:
        The record, written under `record_name`; None where it was there already.

    Raises:
        InputError: see `encode_task` and `load_model`; or the record was made otherwise.
    """

    def features_of_parts():
        model = load_model(folder, training.device)
        parts = encode_task(task, folder, model.config, options)
        longest = max(int(part.lengths.max()) for part in parts)  # beyond it all features are zeros
        if options.features == "hidden":
            features = [hidden_features(model, part, longest, options.pool) for part in parts]
            return *features, feature_width(options.pool, options.max_seq_length, model.config.hidden_size)
        features = [conditional_features(model, part, longest - 2, options.pool) for part in parts]
        return *features, feature_width(options.pool, options.max_seq_length - 2, model.config.vocab_size)

    return _measure(
        folder, record_name(options, task), {"model": describe_model(folder)}, task, options, training, features_of_parts
    )


def probe_lookup_table(task: Task, options, training: TrainingArguments) -> dict | None:
    """Probe the true conditionals of the task's sentences; the record goes into `--output_dir`, a folder without weights.

    Raises:
        InputError: a file is missing or does not belong to the task, a sentence is too long, or the grammar has no
            derivation for it.
    """
    grammar_sha256, make_tables = _tables(task, options)
    folder = _record_folder(training.wanted_output_dir, grammar_sha256)

    def features_of_parts():
        tables, parts = make_tables(), (task.train, task.validation)
        lengths = [np.asarray(table.lengths[: len(part)]) for table, part in zip(tables, parts, strict=True)]
        for words, part in zip(lengths, parts, strict=True):
            check_max_seq_length(words, options.max_seq_length, part.file)
        longest = max(int(words.max()) for words in lengths)
        features = [table_features(table, longest, options.pool, len(part)) for table, part in zip(tables, parts, strict=True)]
        return *features, feature_width(options.pool, options.max_seq_length - 2, len(tables[0].words))

    inputs = {"model": {"name": LOOKUP_TABLE, "grammar_sha256": grammar_sha256}}
    return _measure(folder, record_name(options, task, True), inputs, task, options, training, features_of_parts)


def _tables(task: Task, options):
    """The SHA-256 of the grammar, and a function that gives the lookup tables of the two parts of the task."""
    sources = (task.train.file, task.validation.file)
    if options.rule_path is not None:
        grammar = Grammar.read(find_rules(options.rule_path))
        texts = (task.train.texts, task.validation.texts)
        return grammar.sha256, lambda: [
            LookupTable.compute(grammar, text, source) for text, source in zip(texts, sources, strict=True)
        ]
    files = (options.condprobfile_train, options.condprobfile_validation)
    tables = [LookupTable.open(file) for file in files]
    for table, part in zip(tables, (task.train, task.validation), strict=True):
        table.check_text(part.file)
        table.check_whole(len(part))
    if tables[0].grammar_sha256 != tables[1].grammar_sha256:
        raise InputError(f"{files[0]} and {files[1]}: made from two grammars; make both with the same --rule-path")
    return tables[0].grammar_sha256, lambda: tables


def _record_folder(output_dir, grammar_sha256: str) -> Path:
    """The folder of the lookup table's records, with the `args.json` that tells what it is."""
    folder = Path(output_dir)
    if is_model_folder(folder):
        raise InputError(f"--output_dir {folder}: holds a model; give the lookup table's records a folder of their own")
    facts, path = {"model": LOOKUP_TABLE, "grammar_sha256": grammar_sha256}, folder / FACTS_FILE
    if not path.exists():
        write_json(path, facts)
    elif read_json(path) != facts:
        raise InputError(f"{path}: belongs to another model or grammar; give another --output_dir")
    return folder
