"""Fine-tuning: the whole encoder and a linear head trained on a downstream task with the `Trainer` of Hugging Face.

Source: Liu et al. 2023, appendix A (AdamW, 5 seeds). The head is that of the probe: linear on the concatenated last hidden
states of all positions.
"""

import copy
import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from pcfg.common.files import atomic_open
from pretraining.data.contexts import Contexts, concatenate, sentence_batch
from pretraining.data.tasks import Part, Task, encode_task
from pretraining.evaluation.downstream import (
    DownstreamArguments,
    data_arguments,
    flag,
    measure_accuracy,
    parse_seeds,
    plain_flags,
    training_steps,
)
from pretraining.evaluation.records import AccuracyRecord, FinetuneRecord, is_measured
from pretraining.evaluation.solvers import linear_head
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import describe_model, load_model

# Always in the record, even at their defaults. The other flags are in it if they have another value.
FLAGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps"),
)
# Flags that do not change the result; eval_strategy and eval_steps do, since they decide the best accuracy.
HARMLESS = {
    *("per_device_eval_batch_size", "output_dir", "seed", "do_train", "do_eval", "report_to", "disable_tqdm", "run_name"),
    *("logging_dir", "logging_first_step", "logging_steps", "logging_strategy", "save_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "log_level", "do_predict"),
}


@dataclasses.dataclass(kw_only=True)
class FinetuningArguments(DownstreamArguments):
    """End of training and predictions, in addition to model and data."""

    test_file: str | None = flag(
        default=None,
        help="file to predict the labels of, with --do_predict; in the same format, the label column may be missing",
    )
    early_stopping_patience: int | None = flag(
        default=None, help="evaluations without a better accuracy after which training stops; default: no early stopping"
    )


class ClassificationModel(nn.Module):
    """Encoder and linear head on the concatenated hidden states.

    Args:
        language_model: its MLM head is not used and gets no gradient.
        max_seq_length: positions of the features.
        seed: of the head's initialisation.
    """

    def __init__(self, language_model: MaskedLM, max_seq_length: int, classes: int, seed: int):
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

    def forward(self, input_ids: Tensor, input_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (batch, classes), and with `labels` (batch,) int64 the mean cross-entropy as "loss"."""
        hidden = self.language_model.encode(input_ids, input_mask)  # (batch, length, hidden)
        logits = self.head(concatenate(hidden, input_mask, self.max_seq_length))  # (batch, classes)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SentenceDataset(torch.utils.data.Dataset):
    """Encoded sentences and labels, in whole batches, each trimmed to its longest sentence."""

    def __init__(self, contexts: Contexts, labels: np.ndarray | None):
        self.contexts = contexts
        self.labels = None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.contexts.lengths)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        ids, mask = sentence_batch(self.contexts, np.asarray(indices))
        labels = {} if self.labels is None else {"labels": self.labels[indices]}
        return {"input_ids": ids, "input_mask": mask, **labels}


def _identity(batch: Any) -> Any:
    """The collator of the Trainer: `SentenceDataset` returns whole batches."""
    return batch


def _share_correct(prediction: EvalPrediction) -> dict[str, float]:
    """The metric of the Trainer: predictions are class indices already."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def finetune(
    folder: Path,
    task: Task,
    parts: list[Contexts],
    max_seq_length: int,
    training: TrainingArguments,
    seed: int,
    patience: int | None = None,
) -> dict[str, Any]:
    """Fine-tune the model in `folder` once.

    Args:
        parts: contexts of each of `task.parts()`.
        training: the settings of the Trainer, except seed and output folder.
        patience: evaluations without a better accuracy after which training stops.

    Returns:
        "last" and "best" validation accuracy (best over all evaluations), "train" accuracy on the training part, "steps"; for a
        task with a test part also "predictions", (sentences,) indices into `task.classes`.
    """
    training = copy.copy(training)
    training.seed = seed
    training.remove_unused_columns = False  # the dataset has inputs of the model only
    training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type == "cuda"
    training.metric_for_best_model = "accuracy"
    training.greater_is_better = True
    model = ClassificationModel(load_model(folder), max_seq_length, len(task.classes), seed)
    with tempfile.TemporaryDirectory() as scratch:
        training.output_dir = scratch
        trainer = Trainer(
            model,
            training,
            data_collator=_identity,
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
            # Without labels, since the Trainer would compute a loss: a label of the test part may be unknown to the task.
            predictions["predictions"] = trainer.predict(SentenceDataset(parts[2], None)).predictions
    history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return {"last": last, "best": max(history), "train": train, "steps": trainer.state.global_step, **predictions}


def write_predictions(path: Path, task: Task, test: Part, seeds: list[int], predictions: list[np.ndarray]) -> None:
    """Write the predicted labels of the test part, atomically: one row per sentence, `text` (and `pair`), `seed_S` per seed."""
    columns: dict[str, list] = {"text": test.texts, **({"pair": test.pairs} if test.pairs else {})}
    for seed, indices in zip(seeds, predictions, strict=True):
        columns[f"seed_{seed}"] = [task.classes[index] for index in indices.tolist()]
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _further_fields(
    folder: Path, task: Task, seeds: list[int], runs: list[dict[str, Any]], predictions_file: str
) -> dict[str, Any]:
    """Steps of each run. For a test part: writes the predictions, and returns their accuracies if it has labels."""
    fields: dict[str, Any] = {"steps": [result["steps"] for result in runs]}
    if task.test is not None:
        predictions = [result["predictions"] for result in runs]
        write_predictions(folder / predictions_file, task, task.test, seeds, predictions)
        fields["predictions_file"] = predictions_file
        if task.test.labels is not None:
            fields["test_n"] = len(task.test)
            fields["test_accuracies"] = [float((indices == task.test.labels).mean()) for indices in predictions]
    return fields


def finetune_model(
    folder: Path, task: Task, options: FinetuningArguments, training: TrainingArguments, changed: dict[str, Any]
) -> AccuracyRecord | None:
    """Fine-tune the model in `folder` once per seed.

    Args:
        changed: the training flags that have another value than their default.

    Returns:
        The record, written as `finetune_TASK.json`; None if it exists already.
    """
    further = {name: value for name, value in changed.items() if name not in HARMLESS and name not in FLAGS}
    seeds = parse_seeds(options, training)
    patience = options.early_stopping_patience
    name = f"finetune_{task.name}.json"
    predictions_file = f"finetune_{task.name}_predictions.csv"
    inputs = {**task.inputs(), "model": describe_model(folder)}
    arguments = {
        **plain_flags(training, FLAGS),
        **further,
        "early_stopping_patience": patience,
        **data_arguments(options, seeds),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        training_steps(training, len(task.train))  # refuses a warm-up longer than the training
        parts = encode_task(task, folder, load_model(folder).config, options)
        runs = [finetune(folder, task, parts, options.max_seq_length, training, seed, patience) for seed in seeds]
        return runs, _further_fields(folder, task, seeds, runs, predictions_file)

    is_complete = is_measured(folder, name, inputs, arguments, options.overwrite)
    is_lost = is_complete and task.test is not None and not (folder / predictions_file).exists()
    overwrite = options.overwrite or is_lost
    device = str(training.device)
    return measure_accuracy(folder, name, FinetuneRecord, task, seeds, run, inputs, arguments, device, overwrite)
