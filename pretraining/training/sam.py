"""Sharpness-aware minimisation (SAM; Foret et al. 2021, algorithm 1, p = 2): an intervention on the sharpness of the loss."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SMALLEST_NORM = 1e-30  # of a gradient that has a direction; representable in float32


@contextlib.contextmanager
def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, per_member: bool = False) -> Iterator[None]:
    """Within its block the weights are w + rho g / ||g||, afterwards w, bit for bit.

    ||g|| is the L2 norm over all tensors. A gradient of 0 has no direction: the weights stay. The gradient at the end of the
    ascent, taken within the block, is SAM's: the derivative of the ascent itself is neglected (equation 3 of the paper).

    Args:
        weights: changed in place; the block holds a copy of them.
        gradients: g, of the shapes of `weights`; read before the block begins, which may overwrite them.
        rho: length of the ascent, in the units of the weights.
        per_member: the first axis of every tensor counts members, and each one has its own norm.

    >>> weight, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> with ascent([weight], [gradient], rho=0.5):
    ...     weight
    tensor([1.3000, 2.4000])
    >>> weight
    tensor([1., 2.])
    """
    with torch.no_grad():
        rows = (gradient.reshape(len(gradient) if per_member else 1, -1) for gradient in gradients)
        norm = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)  # (members,), (1,) without members
        scale = rho / norm.clamp_min(SMALLEST_NORM)
        copies = [weight.clone() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.addcmul_(gradient, scale.view(-1, *(1,) * (weight.ndim - 1)) if per_member else scale[0])
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)
