"""Fine-tuning: the whole encoder and a linear head trained on a downstream task with Hugging Face's `Trainer`.

Liu et al. 2023, appendix A (fine-tuning with AdamW, 5 seeds). The head is the probe's: linear on the concatenated last hidden
states of all positions.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

from pretraining.evaluation.contexts import Contexts
from pretraining.evaluation.downstream import Task, encode_task, measure_accuracy, parse_seeds, training_steps
from pretraining.evaluation.heads import concatenate, linear_head, sentence_batch
from pretraining.evaluation.records import describe_model
from pretraining.model.checkpoints import load_model

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
    *("dataloader_num_workers", "dataloader_pin_memory", "log_level"),
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

    def __init__(self, contexts: Contexts, labels: np.ndarray):
        self.contexts, self.labels = contexts, torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict:
        ids, mask = sentence_batch(self.contexts, np.asarray(indices))
        return {"input_ids": ids, "input_mask": mask, "labels": self.labels[indices]}


def _share_correct(prediction) -> dict:
    """The Trainer's metric: predictions are class indices already."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def finetune(folder: Path, task: Task, parts, max_seq_length: int, training: TrainingArguments, seed: int) -> dict:
    """Fine-tune the model in `folder` once.

    Args:
        parts: contexts of the training and of the validation part.
        training: everything that the Trainer is told, but seed and output folder.

    Returns:
        "last" and "best" validation accuracy, best over all evaluations, and the accuracy on the training part, "train".
    """
    training = copy.copy(training)
    training.seed = seed
    training.remove_unused_columns = False  # the dataset has none but the model's inputs
    training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type == "cuda"
    model = ClassificationModel(load_model(folder), max_seq_length, len(task.classes), seed)
    with tempfile.TemporaryDirectory() as scratch:
        training.output_dir = scratch
        trainer = Trainer(
            model,
            training,
            data_collator=lambda batch: batch,  # SentenceDataset gives whole batches
            train_dataset=SentenceDataset(parts[0], task.train_labels),
            eval_dataset=SentenceDataset(parts[1], task.validation_labels),
            compute_metrics=_share_correct,
            preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
        )
        trainer.train()
        last = trainer.evaluate()["eval_accuracy"]
        train = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")["train_accuracy"]
    history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return {"last": last, "best": max(history), "train": train}


def finetune_model(folder: Path, task: Task, options, training: TrainingArguments, given: dict) -> dict | None:
    """Fine-tune the model in `folder` once a seed.

    Args:
        given: the training flags that have another value than their default.

    Returns:
        The record, written as `finetune_TASK.json`; None where it was there already.

    Raises:
        InputError: see `encode_task` and `load_model`; or the record was made otherwise.
    """
    flags = {flag: getattr(training, flag) for flag in FLAGS}
    plain = {flag: getattr(value, "value", value) for flag, value in flags.items()}  # enums by their value
    further = {flag: value for flag, value in given.items() if flag not in HARMLESS and flag not in plain}
    seeds = parse_seeds(options, training)

    def run(seeds):
        training_steps(training, len(task.train_labels))  # refuses a warm-up longer than the training
        parts = encode_task(task, folder, load_model(folder).config, options)
        return [finetune(folder, task, parts, options.max_seq_length, training, seed) for seed in seeds]

    return measure_accuracy(
        folder,
        f"finetune_{task.name}.json",
        "finetune",
        task,
        seeds,
        run,
        inputs={**task.inputs(), "model": describe_model(folder)},
        arguments={**plain, **further, "max_seq_length": options.max_seq_length, "seeds": seeds},
        device=str(training.device),
        overwrite=options.overwrite,
    )
