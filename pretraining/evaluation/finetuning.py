"""Fine-tuning: the whole encoder and a linear head trained on a downstream task with Hugging Face's `Trainer`.

Liu et al. 2023, appendix A (fine-tuning with AdamW, 5 seeds). The head is the probe's: linear on the concatenated last hidden
states of all positions.
"""

import copy
import csv
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from pcfg.common.files import atomic_open
from pretraining.data.contexts import Contexts, concatenate, sentence_batch
from pretraining.data.tasks import Task, encode_task
from pretraining.evaluation.downstream import data_arguments, measure_accuracy, parse_seeds, training_steps
from pretraining.evaluation.heads import linear_head
from pretraining.evaluation.records import is_measured
from pretraining.model.checkpoints import describe_model, load_model

# Always in the record, at their defaults too; of the other flags those that were given another value.
FLAGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps"),
)
# What the result does not depend on; eval_strategy and eval_steps decide the best accuracy and are kept.
HARMLESS = {
    *("per_device_eval_batch_size", "output_dir", "seed", "do_train", "do_eval", "report_to", "disable_tqdm", "run_name"),
    *("logging_dir", "logging_first_step", "logging_steps", "logging_strategy", "save_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "log_level", "do_predict"),
}


class ClassificationModel(nn.Module):
    """Encoder and linear head on the concatenated hidden states.

    Args:
        language_model: a `MaskedLM`; its MLM head takes no part and gets no gradient.
        max_seq_length: positions of the features.
        seed: of the head's initialisation.
    """

    def __init__(self, language_model, max_seq_length: int, classes: int, seed: int):
        super().__init__()
        self.language_model = language_model
        for parameter in (
            *language_model.head_dense.parameters(),
            *language_model.head_norm.parameters(),
            language_model.decoder_bias,
        ):
            parameter.requires_grad_(False)
        self.max_seq_length = max_seq_length
        self.head = linear_head(max_seq_length * language_model.config.hidden_size, classes, seed)

    def forward(self, input_ids, input_mask, labels=None) -> dict:
        """Logits (batch, classes), and with `labels` (batch,) int64 the mean cross-entropy as "loss"."""
        hidden = self.language_model.encode(input_ids, input_mask)  # (batch, length, hidden)
        logits = self.head(concatenate(hidden, input_mask, self.max_seq_length))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SentenceDataset(torch.utils.data.Dataset):
    """Encoded sentences and labels, fetched a batch at a time: trimmed to the longest of the batch, never one by one."""

    def __init__(self, contexts: Contexts, labels: np.ndarray | None):
        self.contexts, self.labels = contexts, None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.contexts.lengths)

    def __getitems__(self, indices: list[int]) -> dict:
        ids, mask = sentence_batch(self.contexts, np.asarray(indices))
        labels = {} if self.labels is None else {"labels": self.labels[indices]}
        return {"input_ids": ids, "input_mask": mask, **labels}


def _share_correct(prediction) -> dict:
    """The Trainer's metric: predictions are class indices already."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def finetune(
    folder: Path, task: Task, parts, max_seq_length: int, training: TrainingArguments, seed: int, patience: int | None = None
) -> dict:
    """Fine-tune the model in `folder` once.

    Args:
        parts: contexts of each of `task.parts()`.
        training: everything that the Trainer is told, but seed and output folder.
        patience: evaluations without a better accuracy after which training stops.

    Returns:
        "last" and "best" validation accuracy, best over all evaluations, that on the training part, "train", "steps" and
        of a task with a test part "predictions", (sentences,) indices into `task.classes`.
    """
    training = copy.copy(training)
    training.seed = seed
    training.remove_unused_columns = False  # the dataset has none but the model's inputs
    training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type == "cuda"
    training.metric_for_best_model, training.greater_is_better = "accuracy", True
    model = ClassificationModel(load_model(folder), max_seq_length, len(task.classes), seed)
    with tempfile.TemporaryDirectory() as scratch:
        training.output_dir = scratch
        trainer = Trainer(
            model,
            training,
            data_collator=lambda batch: batch,  # SentenceDataset gives whole batches
            train_dataset=SentenceDataset(parts[0], task.train.labels),
            eval_dataset=SentenceDataset(parts[1], task.validation.labels),
            compute_metrics=_share_correct,
            preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
            callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        )
        trainer.train()
        last = trainer.evaluate()["eval_accuracy"]
        train = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")["train_accuracy"]
        predictions = {}
        if task.test is not None:
            # Without labels, which it would take the loss of: a label of the test part may be none of the task's.
            predictions["predictions"] = trainer.predict(SentenceDataset(parts[2], None)).predictions
    history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return {"last": last, "best": max(history), "train": train, "steps": trainer.state.global_step, **predictions}


def write_predictions(path, task: Task, seeds: list[int], predictions: list[np.ndarray]) -> None:
    """Write the predicted labels of the test part, atomically: a row a sentence, `text` (and `pair`) and `seed_S` a seed."""
    columns = {"text": task.test.texts, **({"pair": task.test.pairs} if task.test.pairs else {})}
    for seed, indices in zip(seeds, predictions, strict=True):
        columns[f"seed_{seed}"] = [task.classes[index] for index in indices.tolist()]
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _further_details(folder: Path, task: Task, seeds: list[int], runs: list[dict], predictions_file: str) -> dict:
    """Steps of each run and, with a test part, its accuracies where it has labels; the predictions are written."""
    details = {"steps": [result["steps"] for result in runs]}
    if task.test is not None:
        predictions = [result["predictions"] for result in runs]
        write_predictions(folder / predictions_file, task, seeds, predictions)
        details["predictions_file"] = predictions_file
        if task.test.labels is not None:
            details["test_n"] = len(task.test)
            details["test_accuracies"] = [float((indices == task.test.labels).mean()) for indices in predictions]
    return details


def finetune_model(folder: Path, task: Task, options, training: TrainingArguments, given: dict) -> dict | None:
    """Fine-tune the model in `folder` once a seed.

    Args:
        options: `FinetuningArguments` of run_ft.py.
        given: the training flags that have another value than their default.

    Returns:
        The record, written as `finetune_TASK.json`; None where it was there already.

    Raises:
        InputError: see `encode_task` and `load_model`; or the record was made otherwise.
    """
    flags = {flag: getattr(training, flag) for flag in FLAGS}
    plain = {flag: getattr(value, "value", value) for flag, value in flags.items()}  # enums by their value
    further = {flag: value for flag, value in given.items() if flag not in HARMLESS and flag not in plain}
    seeds, patience = parse_seeds(options, training), options.early_stopping_patience
    name, predictions_file = f"finetune_{task.name}.json", f"finetune_{task.name}_predictions.csv"
    inputs = {**task.inputs(), "model": describe_model(folder)}
    arguments = {**plain, **further, "early_stopping_patience": patience, **data_arguments(options, seeds)}

    def run(seeds):
        training_steps(training, len(task.train))  # refuses a warm-up longer than the training
        parts = encode_task(task, folder, load_model(folder).config, options)
        runs = [finetune(folder, task, parts, options.max_seq_length, training, seed, patience) for seed in seeds]
        return runs, _further_details(folder, task, seeds, runs, predictions_file)

    finished = is_measured(folder, name, inputs, arguments, options.overwrite)
    is_lost = finished and task.test is not None and not (folder / predictions_file).exists()
    return measure_accuracy(
        folder,
        name,
        "finetune",
        task,
        seeds,
        run,
        inputs=inputs,
        arguments=arguments,
        device=str(training.device),
        overwrite=options.overwrite or is_lost,
    )
