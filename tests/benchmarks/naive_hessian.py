"""Other estimators of the trace of the Hessian, one estimate per batch of contexts, for benchmark_hessian.py.

Also the dense Hessian by curvlinops, the oracle of the spectrum.
"""

from unittest.mock import patch

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, hutchinson_trace
from torch import nn


class AtMasks(nn.Module):
    """A `MaskedLM` as a function of one tensor, which curvlinops requires: rows of token ids, the masked position last."""

    def __init__(self, model, pad_id: int):
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, rows):
        """(m, length + 1) int64 -> logits (m, vocab_size)."""
        ids = rows[:, :-1]
        position = rows[:, -1]
        flat = torch.arange(len(ids)) * ids.shape[1] + position
        return self.model(ids, ids != self.pad_id, flat)


def released(model: AtMasks, parameters: list, rows, labels) -> float:
    """The released code: a Gaussian probe through the double backward pass of a batch, with a new graph each time."""
    loss = nn.functional.cross_entropy(model(rows), labels)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    probe = [torch.randn_like(parameter) for parameter in parameters]
    along = sum((gradient * v).sum() for gradient, v in zip(gradients, probe, strict=True))
    products = torch.autograd.grad(along, parameters)
    return sum((v * hv).sum() for v, hv in zip(probe, products, strict=True)).item()


def _curvlinops(operator: type, model: AtMasks, parameters: list, rows, labels) -> float:
    """One Rademacher probe of Hutchinson's estimator in curvlinops, without its check of the operator (two products)."""
    data = [(rows, labels)]
    loss = nn.CrossEntropyLoss()
    return hutchinson_trace(operator(model, loss, parameters, data, check_deterministic=False), 1).item()


def hessian(model: AtMasks, parameters: list, rows, labels) -> float:
    return _curvlinops(HessianLinearOperator, model, parameters, rows, labels)


def gauss_newton(model: AtMasks, parameters: list, rows, labels) -> float:
    """The trace of the generalised Gauss-Newton matrix, which for this loss is the Fisher matrix."""
    return _curvlinops(GGNLinearOperator, model, parameters, rows, labels)


def plain_layer_norm(self, inputs):
    """`nn.LayerNorm.forward` in plain operations."""
    variance, mean = torch.var_mean(inputs, -1, correction=0, keepdim=True)
    return (inputs - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def dense_hessian(model: AtMasks, parameters: list, rows, targets) -> torch.Tensor:
    """The Hessian of -sum targets * log f, (n, n); targets (m, vocab_size) are distributions times weights of the contexts.

    curvlinops takes forward derivatives of gradients. Through torch's kernel of the LayerNorm they are wrong (torch 2.13): the
    rows of its weights came out up to 3.2 off, and the matrix was not symmetric. The trace is not concerned.
    """
    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = HessianLinearOperator(model, loss, parameters, [(rows, targets)], check_deterministic=False)
    number = sum(parameter.numel() for parameter in parameters)
    with patch.object(nn.LayerNorm, "forward", plain_layer_norm):
        return operator @ torch.eye(number, dtype=targets.dtype)
