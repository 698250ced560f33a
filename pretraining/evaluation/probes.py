"""Linear probe: a linear classifier on frozen features, trained with AdamW on features that are computed once.

Liu et al. 2023, section 3 (linear probe on the concatenated token representations, AdamW). The head minimises the mean
cross-entropy of softmax(W x + b); weight decay acts on W only, as in transformers' Trainer.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy

from pcfg.artefacts import InputError, keyed_rng, read_json, write_json
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.evaluation.downstream import (
    Task,
    check_max_seq_length,
    encode_task,
    measure_accuracy,
    parse_seeds,
    training_steps,
)
from pretraining.evaluation.heads import conditional_features, hidden_features, linear_head, table_features
from pretraining.evaluation.records import describe_model
from pretraining.model.checkpoints import FACTS_FILE, is_model_folder, load_model

LOOKUP_TABLE = "lookup table"  # the name in args.json by which the report knows it
# The training flags that a probe depends on; the rest of TrainingArguments is about the Trainer, which it does not use.
FLAGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "eval_strategy", "eval_steps"),
)
# Flags that have no bearing on the result of a probe either way.
HARMLESS = {"per_device_eval_batch_size", "output_dir", "seed", "do_train", "do_eval", "report_to", "disable_tqdm"}


def fit_probe(features, labels, validation_features, validation_labels, classes: int, training, seed: int) -> dict:
    """Train a linear head on fixed features.

    Args:
        features, validation_features: (n, width) float32.
        labels, validation_labels: (n,) int64 in 0 .. classes - 1.
        training: `TrainingArguments`; those in `FLAGS` are used. A batch has per_device_train_batch_size x
            gradient_accumulation_steps sentences, the last of an epoch what is left.
        seed: of initialisation and order.

    Returns:
        "last" and "best" validation accuracy (best over the evaluations of --eval_strategy and the last) and "train", the
        last accuracy on the training part.
    """
    device = training.device
    batch_size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps_an_epoch = math.ceil(len(labels) / batch_size)
    steps = training_steps(training, len(labels))
    head = linear_head(features.shape[1], classes, seed).to(device)
    optimizer, scheduler = _optimizer(head, training, steps)
    every = _evaluation_interval(training, steps_an_epoch)
    best, step = 0.0, 0
    with trange(steps, desc=f"probe, seed {seed}", unit="step", leave=False) as progress:
        for epoch in range(math.ceil(steps / steps_an_epoch)):
            order = torch.from_numpy(keyed_rng(seed, "probe-order", epoch).permutation(len(labels)))
            for batch in order.split(batch_size)[: steps - step]:
                loss = F.cross_entropy(head(features[batch].to(device)), labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                if training.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(head.parameters(), training.max_grad_norm)
                optimizer.step()
                scheduler.step()
                step += 1
                progress.update()
                if every and step % every == 0 and step < steps:
                    best = max(best, accuracy(head, validation_features, validation_labels))
    last = accuracy(head, validation_features, validation_labels)
    return {"last": last, "best": max(best, last), "train": accuracy(head, features, labels)}


def _optimizer(head, training: TrainingArguments, steps: int) -> tuple:
    """AdamW on the head and the schedule of the learning rate over `steps`."""
    groups = [
        {"params": [head.weight], "weight_decay": training.weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    betas = (training.adam_beta1, training.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    return optimizer, scheduler


def _evaluation_interval(training: TrainingArguments, steps_an_epoch: int) -> int | None:
    """Steps between two evaluations on the way; None for none."""
    if training.eval_strategy == IntervalStrategy.EPOCH:
        return steps_an_epoch
    return int(training.eval_steps) if training.eval_strategy == IntervalStrategy.STEPS else None


@torch.inference_mode()
def accuracy(head, features, labels, batch_size: int = 4096) -> float:
    """Share of sentences whose largest logit is that of their label."""
    device = head.weight.device
    correct = 0  # a count, divided once at the end
    for rows, truth in zip(features.split(batch_size), labels.split(batch_size), strict=True):
        correct += int((head(rows.to(device)).argmax(-1).cpu() == truth).sum())
    return correct / len(labels)


def ineffective_flags(given: dict) -> list[str]:
    """The training flags in `given` that a probe does not follow."""
    return sorted(given.keys() - set(FLAGS) - HARMLESS)


def _measure(folder: Path, name: str, inputs: dict, task: Task, options, training, features_of_parts) -> dict | None:
    """Fit the probe once a seed on what `features_of_parts()` gives (training part, validation part); write the record."""
    flags = {flag: getattr(training, flag) for flag in FLAGS}
    plain = {flag: getattr(value, "value", value) for flag, value in flags.items()}  # enums by their value
    seeds = parse_seeds(options, training)

    def run(seeds):
        train, validation = features_of_parts()
        labels, validation_labels = torch.from_numpy(task.train_labels), torch.from_numpy(task.validation_labels)
        sizes = (len(task.classes), training)
        return [fit_probe(train, labels, validation, validation_labels, *sizes, seed) for seed in seeds]

    return measure_accuracy(
        folder,
        name,
        "probe",
        task,
        seeds,
        run,
        features=options.features,
        inputs={**task.inputs(), **inputs},
        arguments={**plain, "features": options.features, "max_seq_length": options.max_seq_length, "seeds": seeds},
        device=str(training.device),
        overwrite=options.overwrite,
    )


def probe_model(folder: Path, task: Task, options, training: TrainingArguments) -> dict | None:
    """Probe the model in `folder`: its hidden states, or its predicted conditionals (`options.features`).

    Returns:
        The record, written as `probe_TASK.json` or `probe_conditional_TASK.json`; None where it was there already.

    Raises:
        InputError: see `encode_task` and `load_model`; or the record was made otherwise.
    """

    def features_of_parts():
        model = load_model(folder, training.device)
        parts = encode_task(task, folder, model.config, options)
        if options.features == "hidden":
            return [hidden_features(model, part, options.max_seq_length) for part in parts]
        return [conditional_features(model, part, options.max_seq_length - 2) for part in parts]

    name = f"probe_{task.name}.json" if options.features == "hidden" else f"probe_conditional_{task.name}.json"
    return _measure(folder, name, {"model": describe_model(folder)}, task, options, training, features_of_parts)


def probe_lookup_table(task: Task, options, training: TrainingArguments) -> dict | None:
    """Probe the true conditionals of the task's sentences; the record goes into `--output_dir`, a folder without weights.

    Raises:
        InputError: a file is missing or does not belong to the task, a sentence is too long, or the grammar has no
            derivation for it.
    """
    grammar_sha256, make_tables = _tables(task, options)
    folder = _record_folder(training.wanted_output_dir, grammar_sha256)

    def features_of_parts():
        tables = make_tables()
        for table, source in zip(tables, (task.train_file, task.validation_file), strict=True):
            check_max_seq_length(np.asarray(table.lengths), options.max_seq_length, source)
        return [table_features(table, options.max_seq_length - 2) for table in tables]

    inputs = {"model": {"name": LOOKUP_TABLE, "grammar_sha256": grammar_sha256}}
    return _measure(folder, f"probe_{task.name}.json", inputs, task, options, training, features_of_parts)


def _tables(task: Task, options):
    """The SHA-256 of the grammar, and a function that gives the lookup tables of the two parts of the task."""
    sources = (task.train_file, task.validation_file)
    if options.rule_path is not None:
        grammar = Grammar.read(find_rules(options.rule_path))
        texts = (task.train_texts, task.validation_texts)
        return grammar.sha256, lambda: [
            LookupTable.compute(grammar, text, source) for text, source in zip(texts, sources, strict=True)
        ]
    files = (options.condprobfile_train, options.condprobfile_validation)
    tables = [LookupTable.open(file) for file in files]
    for table, source in zip(tables, sources, strict=True):
        table.check_text(source)
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
