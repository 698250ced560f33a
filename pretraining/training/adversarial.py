"""Adversarial pre-training: hidden states that are bad for a downstream task, at the same loss (Liu et al. 2023, App. A.4).

A step minimises L_MLM - weight x L_val. L_val is the validation loss of a linear head that is fitted in closed form to features
of labelled sentences, which differ from step to step.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pcfg.common.files import AnyPath, InputError, describe_file, keyed_rng
from pretraining.data.contexts import concatenate, from_texts, sentence_batch
from pretraining.data.masking import check_lengths
from pretraining.data.tasks import read_labelled_part
from pretraining.data.vocabulary import Vocabulary
from pretraining.training.batches import Packing, by_length, cuts, seed_dropout, to_device

Encoder = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # of ids and mask
FourTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ridge_validation_loss(
    features: torch.Tensor, targets: torch.Tensor, validation: torch.Tensor, validation_targets: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Squared error, on validation rows, of the linear head fitted by ridge regression to other rows.

    With rows phi / ||phi|| in Phi and Phi_val, W = argmin ||Phi W - Y||^2 + ridge ||W||^2 = Phi^T alpha with
    alpha = (Phi Phi^T + ridge I)^-1 Y (the dual form: there are fewer rows than features), and the loss is

        1/n sum_i ||(Phi_val Phi^T alpha)_i - (Y_val)_i||^2,

    a sum over classes and a mean over rows: with one-hot targets minus 1/C, a head that predicts 0 costs 1 - 1/C.

    The gradient goes through both parts' features. All of it is in float64: the condition number of the matrix, up to
    rows / ridge, is too large for float32, and neither autocast nor TF32 affects float64. If the Cholesky factorisation fails
    the loss is NaN: nothing is raised, the host never waits.

    Args:
        features, targets: (m, d) and (m, C), of the rows to which the head is fitted; not normalised, of any float type.
        validation, validation_targets: (n, d) and (n, C).
        ridge: above 0.

    >>> unit = torch.eye(2)
    >>> targets = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    >>> round(ridge_validation_loss(unit, targets, 3 * unit, targets, ridge=1.0).item(), 6)  # W = targets / 2
    0.125
    """
    features, validation = (F.normalize(rows.double(), dim=1) for rows in (features, validation))
    kernel = features @ features.T  # (m, m)
    factor, failed = torch.linalg.cholesky_ex(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
    alpha = torch.cholesky_solve(targets.double(), factor)  # (m, C)
    error = validation @ features.T @ alpha - validation_targets
    return error.square().sum(1).mean().masked_fill(failed != 0, torch.nan)


class AdversarialTerm:
    """The adversarial term of a model in a step, from the labelled sentences of a task.

    The sentences of a step and its dropout masks are a function of (seed, step): the term is the same on all ranks, for any
    number of ranks. `size` distinct sentences are drawn without replacement in proportion to their frequency in the file,
    shuffled and cut in the middle: the head is fitted on the first half. No sentence is in both halves, or twice in one.

    Args:
        path: CSV file `text,label`; all copies of a sentence have one label.
        size: sentences per step, even.
        positions: width of the concatenated features in hidden states, zeros at padding.
    """

    def __init__(self, path: AnyPath, size: int, ridge: float, vocabulary: Vocabulary, positions: int, seed: int):
        part, classes = read_labelled_part(Path(path))
        labels = part.labels
        assert labels is not None
        self._contexts = from_texts(part.texts, vocabulary, path)
        check_lengths(self._contexts.lengths - 2, positions, path, "samples of --max_seq_length")
        ids = self._contexts.input_ids
        # The distinct sentences: each one's first row, and its number of rows.
        _, self._row, sentence, counts = np.unique(ids, axis=0, return_index=True, return_inverse=True, return_counts=True)
        first = self._row[sentence.ravel()]
        if (other := np.flatnonzero(labels != labels[first])).size:
            raise InputError(
                f"{path}: sentences {first[other[0]] + 1} and {other[0] + 1} are the same, but their labels are "
                f"{classes[labels[first[other[0]]]]} and {classes[labels[other[0]]]}; remove one of them"
            )
        if len(counts) < size:
            raise InputError(
                f"{path}: has {len(counts)} distinct sentences, fewer than --adversarial_batch_size {size}; make that smaller, "
                "or a file of more sentences (--sentence-num of generate_downstream.py)"
            )
        self._probabilities = counts / counts.sum()
        self._targets = np.eye(len(classes))[labels] - 1 / len(classes)  # (sentences, C)
        self._size = size
        self.ridge = ridge
        self.positions = positions
        self._seed = seed
        self.facts = describe_file(path)  # for the record of a run

    def of_stream(self, seed: int) -> "AdversarialTerm":
        """The same term with the sentences and dropout masks of another seed."""
        other = copy.copy(self)
        other._seed = seed
        return other

    def rows(self, step: int) -> np.ndarray:
        """The sentences of a step, (size,) int64 rows of the file: the head is fitted on the first half."""
        rng = keyed_rng(self._seed, "adversarial batch", step)
        drawn = rng.choice(len(self._row), self._size, replace=False, p=self._probabilities)
        return self._row[rng.permutation(drawn)]  # shuffled, since frequent sentences tend to be drawn first

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """The validation loss of the head on the features of step `step`: a scalar, float64, with its graph.

        `model` is a `MaskedLM`, or DeepSpeed's engine of one, in training mode, with dropout.
        """
        seed_dropout(self._seed, "adversarial dropout", step)

        def encode(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            mask = None if mask is None else mask[0]
            return concatenate(model(ids[0], mask, None), mask, self.positions)[None]

        fitted, targets, others, other_targets = self.parts(self.rows(step)[None], encode, next(model.parameters()).device)
        return ridge_validation_loss(fitted[0], targets[0], others[0], other_targets[0], self.ridge)

    def parts(self, rows: np.ndarray, encode: Encoder, device: torch.device) -> FourTensors:
        """The tensors of `ridge_validation_loss` for `rows`, (members, size) as from `rows`, with members as first axis.

        Args:
            encode: features (members, batch, positions * hidden) of ids (members, batch, length) and their mask, None without
                padding. It gets sentences of similar length: each member's, sorted, are cut at the same places.
        """
        half = self._size // 2
        order, longest = by_length(self._contexts.lengths[rows])
        rows_by_length = np.take_along_axis(rows, order, 1)
        encoded = []
        for start, end in cuts(longest, Packing.overhead):
            block = rows_by_length[:, start:end]
            ids, is_token = sentence_batch(self._contexts, block.ravel())
            mask = None if is_token.all() else to_device(is_token.view(*block.shape, -1), device)
            encoded.append(encode(to_device(ids.view(*block.shape, -1), device), mask))
        # From the order of lengths to that of `rows`.
        place = to_device(torch.from_numpy(np.argsort(order, axis=1)), device)[..., None]  # (members, size, 1)
        features = torch.cat(encoded, dim=1).take_along_dim(place, dim=1)  # (members, size, positions * hidden)
        targets = to_device(torch.from_numpy(self._targets[rows]), device)
        return features[:, :half], targets[:, :half], features[:, half:], targets[:, half:]
