"""Fine-tuning: the whole encoder and a linear head trained on a downstream task with the `Trainer` of Hugging Face.

Source: Liu et al. 2023, appendix A (AdamW, 5 seeds). The head is that of the probe: linear on the concatenated last hidden
states of all positions.
"""

import copy
import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from pcfg.common.files import atomic_open
from pcfg.common.ranks import use_threads
from pretraining.data.contexts import Contexts, concatenate, sentence_batch
from pretraining.data.tasks import Part, Task, encode_task
from pretraining.evaluation import downstream
from pretraining.evaluation.downstream import TRAINING_FLAGS, DownstreamArguments, flag
from pretraining.evaluation.records import FinetuneRecord
from pretraining.evaluation.solvers import check_loss, finite_argmax, linear_head
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import describe_model, load_model

# Further flags that do not change the result; eval_strategy and eval_steps do, since they decide the best accuracy.
FINETUNING_HARMLESS = downstream.HARMLESS | {
    *("logging_dir", "logging_first_step", "logging_steps", "logging_strategy", "save_steps", "run_name"),
    *("dataloader_num_workers", "dataloader_pin_memory", "log_level", "do_predict"),
}


# Training flags that the measurement itself sets, or that are about the checkpoints that it does not keep.
INEFFECTIVE = {
    *("resume_from_checkpoint", "output_dir", "metric_for_best_model", "greater_is_better", "remove_unused_columns"),
    *("prediction_loss_only", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "ignore_data_skip"),
    *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint"),
    *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
}


@dataclasses.dataclass(kw_only=True)
class FinetuningArguments(DownstreamArguments):
    """End of training and predictions, in addition to model and data."""

    test_file: str | None = flag(
        default=None, help="file to predict the labels of, with --do_predict; same format, the label column may be missing"
    )
    early_stopping_patience: int | None = flag(
        default=None, help="evaluations without a better accuracy after which training stops; default: no early stopping"
    )


class ClassificationModel(nn.Module):
    """Encoder and linear head on the concatenated hidden states; the MLM head is not used and gets no gradient."""

    def __init__(self, language_model: MaskedLM, max_seq_length: int, classes: int, seed: int):
        super().__init__()
        self.language_model = language_model
        for unused in (language_model.head_dense, language_model.head_norm, language_model.decoder_bias):
            unused.requires_grad_(False)
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
        patience: evaluations without a better accuracy after which training stops.

    Returns:
        "last" and "best" validation accuracy (best over all evaluations), "train" accuracy on the training part, "steps"; for a
        task with a test part also "predictions", (sentences,) indices into `task.classes`.
    """
    training = copy.copy(training)
    training.seed = seed
    training.prediction_loss_only = False
    training.remove_unused_columns = False  # the dataset has inputs of the model only
    training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type == "cuda"
    training._n_gpu = min(training.n_gpu, 1)  # else the Trainer multiplies the batch by the number of GPUs
    training.metric_for_best_model = "accuracy"
    training.greater_is_better = True
    model = ClassificationModel(load_model(folder), max_seq_length, len(task.classes), seed)
    with tempfile.TemporaryDirectory() as scratch:
        training.output_dir = scratch
        trainer = Trainer(
            model,
            training,
            data_collator=lambda batch: cast(dict, batch),  # `SentenceDataset` returns whole batches
            train_dataset=SentenceDataset(parts[0], task.train.labels),
            eval_dataset=SentenceDataset(parts[1], task.validation.labels),
            compute_metrics=_share_correct,
            preprocess_logits_for_metrics=lambda logits, _labels: finite_argmax(logits),
            callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        )
        trainer.train()
        validation = trainer.evaluate()
        train = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")
        check_loss(train["train_loss"])
        predictions = {}
        if task.test is not None:
            # Without labels, since the Trainer would compute a loss: a label of the test part may be unknown to the task.
            predictions["predictions"] = trainer.predict(SentenceDataset(parts[2], None)).predictions
    history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    steps = trainer.state.global_step
    accuracies = {"last": validation["eval_accuracy"], "best": max(history), "train": train["train_accuracy"]}
    return {**accuracies, "steps": steps, **predictions}


def write_predictions(path: Path, task: Task, test: Part, seeds: list[int], predictions: list[np.ndarray]) -> None:
    """Write the predicted labels of the test part, atomically: one row per sentence, `text` (and `pair`), `seed_S` per seed."""
    columns: dict[str, list] = {"text": test.texts, **({"pair": test.pairs} if test.pairs else {})}
    for seed, indices in zip(seeds, predictions, strict=True):
        columns[f"seed_{seed}"] = [task.classes[index] for index in indices.tolist()]
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def finetune_model(
    folder: Path, output: Path, task: Task, options: FinetuningArguments, training: TrainingArguments, changed: dict[str, Any]
) -> None:
    """Fine-tune the model in `folder` once per seed, and write `finetune_TASK.json` (and the predictions of a test part).

    Args:
        output: folder of the results.
        changed: the training flags that have another value than their default. The record has them, and `TRAINING_FLAGS`.
    """
    patience = options.early_stopping_patience
    predictions_file = f"finetune_{task.name}_predictions.csv"

    def run(seeds: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        downstream.training_steps(training, len(task.train))  # refuses a warm-up longer than the training
        config = load_model(folder).config
        use_threads(config.hidden_size)
        parts = encode_task(task, folder, config, options)
        runs = [finetune(folder, task, parts, options.max_seq_length, training, seed, patience) for seed in seeds]
        fields: dict[str, Any] = {"steps": [result["steps"] for result in runs]}
        if task.test is not None:
            predictions = [result["predictions"] for result in runs]
            write_predictions(output / predictions_file, task, task.test, seeds, predictions)
            fields["predictions_file"] = predictions_file
            if task.test.labels is not None:
                fields["test_n"] = len(task.test)
                fields["test_accuracies"] = [float((indices == task.test.labels).mean()) for indices in predictions]
        return runs, fields

    further = {name: value for name, value in changed.items() if name not in (*FINETUNING_HARMLESS, *TRAINING_FLAGS)}
    flags = {**downstream.plain_flags(training, TRAINING_FLAGS), **further, "early_stopping_patience": patience}
    name = f"finetune_{task.name}.json"
    files = () if task.test is None else (predictions_file,)
    model = describe_model(folder)
    downstream.measure_accuracy(output, name, FinetuneRecord, task, options, training, model, flags, run, files)
