"""The classification model against features and head apart, and the Trainer's accuracies against a loop of our own."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from pcfg.common.files import read_json, write_json
from pcfg.common.text import read_texts
from pretraining.data.contexts import from_texts, sentence_batch
from pretraining.data.tasks import Part, Task
from pretraining.evaluation.downstream import DownstreamTrainingArguments
from pretraining.evaluation.features import hidden_features
from pretraining.evaluation.finetuning import ClassificationModel, SentenceDataset, finetune
from pretraining.evaluation.solvers import linear_head
from pretraining.model.checkpoints import load_model, load_vocabulary

LENGTH = 10


@pytest.fixture(scope="module")
def parts(tiny_model, tiny_data):
    vocabulary = load_vocabulary(tiny_model)
    texts = read_texts(tiny_data / "training0.txt")
    return from_texts(texts[:300], vocabulary, "train"), from_texts(texts[300:500], vocabulary, "validation")


def labels_of(contexts):
    """Three classes of first words."""
    return contexts.input_ids[:, 1] % 3


@pytest.fixture(scope="module")
def task(parts):
    train, validation = (Part(None, [""] * len(part.lengths), None, labels_of(part)) for part in parts)
    return Task("first_word", train, validation, None, [0, 1, 2], 0.5, 0, False)


def arguments(**changes):
    flags = {"learning_rate": 1e-2, "num_train_epochs": 4, "per_device_train_batch_size": 32, "disable_tqdm": True}
    return DownstreamTrainingArguments(use_cpu=True, **{**flags, **changes})


@torch.no_grad()
def test_logits_are_the_head_on_the_features(tiny_model, parts):
    model = ClassificationModel(load_model(tiny_model), LENGTH, 3, seed=5).eval()
    ids, mask = sentence_batch(parts[0], np.arange(50))
    features = hidden_features(load_model(tiny_model), parts[0], LENGTH)[:50]
    expected = linear_head(features.shape[1], 3, 5)(features)
    torch.testing.assert_close(model(ids, mask)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_the_encoder_and_not_the_language_model_head(tiny_model, parts, task):
    model = ClassificationModel(load_model(tiny_model), LENGTH, 3, seed=0)
    batch = SentenceDataset(parts[0], task.train.labels).__getitems__([3, 1, 4])
    assert batch["labels"].tolist() == task.train.labels[[3, 1, 4]].tolist()
    model(**batch)["loss"].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert {name.split(".")[1] for name in without} == {"head_dense", "head_norm", "decoder_bias"}


def test_finetuning_learns_and_is_reproducible(tiny_model, parts, task):
    settings = arguments(eval_strategy="steps", eval_steps=10)
    first, again = (finetune(tiny_model, task, parts, LENGTH, settings, seed=3) for _ in range(2))
    assert first == again
    assert first["last"] > 0.9 and first["best"] >= first["last"]
    untrained = finetune(tiny_model, task, parts, LENGTH, arguments(learning_rate=1e-12), seed=3)
    assert untrained["last"] < 0.7
    assert finetune(tiny_model, task, parts, LENGTH, arguments(max_steps=1), seed=4) != finetune(
        tiny_model, task, parts, LENGTH, arguments(max_steps=1), seed=5
    )


def test_predictions_are_those_of_the_fine_tuned_model(tiny_model, parts, task):
    """Predictions of the validation sentences, given as a test part without labels, have the validation accuracy."""
    test = Part(None, task.validation.texts, None, None)
    with_test = dataclasses.replace(task, test=test)
    fitted = finetune(tiny_model, with_test, (*parts, parts[1]), LENGTH, arguments(max_steps=15), seed=0)
    predictions = fitted.pop("predictions")
    assert fitted == finetune(tiny_model, task, parts, LENGTH, arguments(max_steps=15), seed=0)
    assert (predictions == task.validation.labels).mean() == fitted["last"] < 1


def test_training_stops_early_when_the_accuracy_gets_no_better(tiny_model, parts, task):
    """At a learning rate that changes nothing, the first evaluation is the best one and `patience` more follow."""
    every = {"eval_strategy": "steps", "eval_steps": 3, "num_train_epochs": 4}  # 40 steps
    still = finetune(tiny_model, task, parts, LENGTH, arguments(learning_rate=1e-12, **every), seed=0, patience=2)
    assert still["steps"] == 9 and still["best"] == still["last"]
    moving = finetune(tiny_model, task, parts, LENGTH, arguments(**{**every, "num_train_epochs": 1}), seed=0, patience=2)
    assert moving["steps"] == 10


def test_trainer_agrees_with_a_plain_loop(tiny_model, parts, task, tmp_path):
    """Full batches without dropout: AdamW with a linear schedule, written out, gives the Trainer's accuracy."""
    folder = tmp_path / "no_dropout"
    shutil.copytree(tiny_model, folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    (folder / "args.json").unlink()  # it has the hash of the other config.json
    write_json(folder / "args.json", {})  # which had the hash of the other configuration
    settings = arguments(per_device_train_batch_size=300, max_steps=8, max_grad_norm=0.0)
    got = finetune(folder, task, parts, LENGTH, settings, seed=0)["last"]
    naive = ClassificationModel(load_model(folder), LENGTH, 3, seed=0)
    optimizer = torch.optim.AdamW([p for p in naive.parameters() if p.requires_grad], weight_decay=0.0)
    ids, mask = sentence_batch(parts[0], np.arange(300))
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 8)
        optimizer.zero_grad()
        naive(ids, mask, torch.from_numpy(task.train.labels))["loss"].backward()
        optimizer.step()
    ids, mask = sentence_batch(parts[1], np.arange(200))
    right = (naive(ids, mask)["logits"].argmax(-1).numpy() == task.validation.labels).mean()
    assert got == pytest.approx(right, abs=0.011)  # a sentence or two may lie on the border
    assert 0.4 < right < 0.99  # neither untrained nor too easy to tell anything


def test_several_gpus_train_with_the_batch_that_was_asked_for(tiny_model, parts, task):
    several = arguments(num_train_epochs=1)
    several._n_gpu = 2 + several.n_gpu  # as transformers sets it on a machine with two
    assert finetune(tiny_model, task, list(parts), LENGTH, several, 0)["steps"] == 10  # 300 sentences in batches of 32
