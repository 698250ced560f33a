import copy
import csv
import functools
import shlex
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pcfg.common.text import read_texts, write_labelled
from pretraining.data.samples import read_samples
from pretraining.data.vocabulary import Vocabulary
from pretraining.training import trainer
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.batches import global_batches

SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 32 --train_micro_batch_size_per_gpu 8 --lr_schedule step "
    "--max_steps 8 --print_steps 1"
)
NO_DROPOUT = "--hidden_dropout_prob 0 --attention_probs_dropout_prob 0"
PLAIN_SGD = (
    "--optimizer_type sgd --sgd_momentum 0 --weight_decay 0 --gradient_clipping 0 --lr_schedule constant_step "
    "--num_warmup_steps 0 --curve const --lr 1.0"
)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def crash_after_saving(monkeypatch, number):
    """Make the run die when its training state number `number` has been written."""
    save, saved = trainer.Trainer.save_state, []

    def dying(self):
        save(self)
        saved.append(self.progress.step)
        if len(saved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "save_state", dying)


@pytest.fixture(scope="session")
def train_in(tiny_samples):
    """Runs the pre-training of a small model in this process, by the clock `now`; returns its final model folder.

    Of a run that a signal interrupts, the folder of its training state.
    """
    from pcfg.common.cli import Interrupted
    from pretraining.evaluation.loss import gap_meter
    from pretraining.training import arguments as command_line
    from pretraining.training.pretrain import pretrain

    def run(folder, flags="", job="job", data=tiny_samples, now=time.monotonic):
        fixed = ["--dataset_path", str(data), "--output_dir", str(folder), "--job_name", job]
        parser = command_line.build_parser("")
        options = parser.parse_args([*fixed, *shlex.split(SMALL), *shlex.split(flags)])
        command_line.check(options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "monotonic", now)
            try:
                return pretrain(options, gap_meter)
            except Interrupted as interrupted:
                return interrupted.state

    return run


@pytest.fixture
def train(train_in, tmp_path):
    """The same in the test's own folder."""
    return functools.partial(train_in, tmp_path)


@pytest.fixture(scope="session")
def naive_loss():
    """Mean of -log f over the masks of some samples, from one batch padded to the full length and logits at every position."""

    def compute(model, samples, rows):
        hidden = model.encode(torch.from_numpy(samples.input_ids[rows]).long(), torch.from_numpy(samples.input_mask[rows]))
        logits = model.predict(hidden)
        labels = torch.full(logits.shape[:2], -100)
        for i, row in enumerate(rows):
            for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True):
                if position:
                    labels[i, position] = int(word)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return compute


@pytest.fixture(scope="session")
def relative_error():
    """L2 norm of (weights before - weights after - gradient) over that of the gradient: of a step of SGD with rate 1."""

    def compute(before, after):
        after = dict(after.named_parameters())
        wrong = sum((old - after[name] - old.grad).double().square().sum() for name, old in before.named_parameters())
        return (wrong / sum(old.grad.double().square().sum() for old in before.parameters())).sqrt().item()

    return compute


@pytest.fixture(scope="session")
def labelled(tiny_data, tmp_path_factory):
    """A file of 60 sentences of `tiny_data`, labelled by their third word; some are in it twice."""
    path = tmp_path_factory.mktemp("labelled") / "task.csv"
    texts = read_texts(tiny_data / "test0.txt")[:60]
    thirds = [text.split()[2] for text in texts]
    write_labelled(path, texts, [10 * sorted(set(thirds)).index(word) for word in thirds])
    return path


@pytest.fixture(scope="session")
def naive_adversarial():
    """The adversarial loss on some rows of a labelled file, in float64: one padded sentence at a time, and the primal head."""

    def compute(model, path, vocabulary, rows, ridge=1e-3, positions=10):
        vocabulary = Vocabulary.read(vocabulary)
        with open(path) as file:
            table = list(csv.DictReader(file))
        classes = sorted({int(row["label"]) for row in table})
        features, targets = [], []
        for row in rows:
            words = [vocabulary.cls_id, *(vocabulary.ids[word] for word in table[row]["text"].split()), vocabulary.sep_id]
            mask = torch.tensor([[1] * len(words) + [0] * (positions - len(words))])
            hidden = model.encode(torch.tensor([words + [vocabulary.pad_id] * (positions - len(words))]), mask)[0].double()
            hidden = (hidden * mask[0, :, None]).flatten()  # (positions * hidden,)
            features.append(hidden / hidden.norm())
            targets.append([float(int(table[row]["label"]) == label) - 1 / len(classes) for label in classes])
        phi, y, half = torch.stack(features), torch.tensor(targets, dtype=torch.float64), len(rows) // 2
        fit = phi[:half]
        head = torch.linalg.solve(fit.T @ fit + ridge * torch.eye(fit.shape[1], dtype=fit.dtype), fit.T @ y[:half])
        return ((phi[half:] @ head - y[half:]) ** 2).sum() / (len(rows) - half)

    return compute


@pytest.fixture(scope="session")
def naive_total(naive_loss, naive_adversarial, tiny_samples, tiny_data, labelled):
    """Masked-LM and adversarial loss of a model at step 0; its parameters are given the gradient of the total."""

    def compute(model, batch_size, weight):
        samples, words = read_samples(tiny_samples / "train_shard_0.hdf5"), tiny_data / "vocab.txt"
        rows = AdversarialTerm(labelled, 20, 1e-3, Vocabulary.read(words), 10, 42).rows(0)
        term = naive_adversarial(model, labelled, words, rows)
        loss = naive_loss(model, samples, global_batches(len(samples), batch_size, 42, 0, "")[0])
        (loss - weight * term).backward()
        return loss.item(), term.item()

    return compute


@pytest.fixture(scope="session")
def naive_sam(naive_total):
    """Losses of a model at step 0; its parameters are given SAM's gradient: that of a copy moved by rho along the gradient."""

    def compute(model, batch_size, weight, rho):
        losses = naive_total(model, batch_size, weight)
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        moved = copy.deepcopy(model)
        for parameter, old in zip(moved.parameters(), model.parameters(), strict=True):
            parameter.data = old.data + rho * old.grad / gradient.norm()
            parameter.grad = None
        naive_total(moved, batch_size, weight)
        for parameter, other in zip(model.parameters(), moved.parameters(), strict=True):
            parameter.grad = other.grad
        return losses

    return compute
