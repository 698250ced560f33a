"""Numbers of flatness that need no choice of a scale, from the trace of each parameter tensor.

balanced    All embedding tables can be divided by s and the head norm's weight and bias multiplied by s: the function stays the
            same, up to the epsilon of the embedding norm, in pre-LN and post-LN. With T the trace of the tables, H of the head
            norm, M of the matrices and V of all other vectors, the trace becomes s^2 T + H / s^2 + M + V. Its minimum over s is

                2 sqrt(T H) + M + V,     in the parameters of a model K times as wide     2 sqrt(T H) + M + V / K.

relative    R = sum over parameter tensors of ||theta_p||^2 Tr_p (compare Petzka et al. 2021, arXiv 2001.00939): the trace in
            units of each tensor's own norm, the same after any rescaling between tensors. Shifts (words + c or positions + c,
            with token types - c) leave the function as it is too, but change ||theta_p||^2. The convention is: the row means of
            the word table and of the position table are moved into row 0 of the token types, the only one in use. Rows that no
            sentence reads (longer positions, other token types) have no trace and do not count.

constant    The trace in directions that add one vector to the embedding sum of every token: for a unit vector u of the hidden
            dimension, u in row 0 of the token types, u / sqrt(rows) in every row of the word or the position table. They are
            three copies of one direction of the function. With Tr the token types' trace: Tr (1 + 1 / words + 1 / positions).

What each number removes: balanced the scale of tables against head norm; R every rescaling of whole tensors against each other,
and with its convention shifts of the tables. Neither removes rescaling inside a tensor (query against key and value against
output, by rows of one matrix), and balanced removes no rescaling of encoder matrices.
"""

import math
from typing import Any

import numpy as np
import torch

from pretraining.evaluation.records import BalancedTrace, TensorTrace, TracePart
from pretraining.model.enlarge import TABLES

WORDS, POSITIONS, TOKEN_TYPES = TABLES
PARTS = ("tables", "head_norm", "matrices", "vectors")  # T, H, M, V


def part_of(name: str, dimensions: int) -> str:
    """The member of `PARTS` that a parameter belongs to.

    >>> part_of("embeddings.words.weight", 2), part_of("head_norm.bias", 1), part_of("head_dense.weight", 2)
    ('tables', 'head_norm', 'matrices')
    """
    if name in TABLES:
        return "tables"
    if name.startswith("head_norm."):
        return "head_norm"
    return "matrices" if dimensions == 2 else "vectors"


def mean_and_covariance(values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over sentences and the covariance of these means, from values of independent units.

    Args:
        values: (n, columns), the mean over each unit's sentences; n is 2 or more.
        sizes: (n,) sentences of each unit.

    Returns:
        R = sum s_i y_i / sum s_i, (columns,), and n / (n - 1) sum s_i^2 (y_i - R)(y_i - R)^T / (sum s_i)^2, (columns, columns):
        its diagonal is the square of the errors of `pretraining.evaluation.hessian.mean_and_error`.
    """
    number = len(values)
    mean = sizes @ values / sizes.sum()
    deviations = (values - mean) * (sizes / sizes.sum())[:, None]
    return mean, deviations.T @ deviations * number / (number - 1)


def balanced_trace(parts: BalancedTrace, times: float = 1.0) -> TracePart | None:
    """2 sqrt(T H) + M + V / K for K = `times`, with its standard error by the delta method; None where it is not defined."""
    if parts.reason is not None:
        return None
    tables, head_norm = parts.tables, parts.head_norm
    value = 2 * math.sqrt(tables * head_norm) + parts.matrices + parts.vectors / times
    gradient = np.array([math.sqrt(head_norm / tables), math.sqrt(tables / head_norm), 1.0, 1.0 / times])
    variance = gradient @ np.array(parts.covariance) @ gradient
    return TracePart(value=value, standard_error=math.sqrt(max(0.0, variance)))


def balance(values: np.ndarray, sizes: np.ndarray, errors: float) -> BalancedTrace:
    """The record of the balanced trace.

    Args:
        values: (n, 4), T, H, M, V of independent units; sizes as in `mean_and_covariance`.
        errors: standard errors by which T and H must be positive: 0 for sums of squares, 2 for estimates that can be negative.
    """
    means, covariance = mean_and_covariance(values, sizes)
    reason = None
    for name, mean, variance in zip(PARTS[:2], means, covariance.diagonal(), strict=False):
        error = math.sqrt(variance)
        if not mean > errors * error:
            bound = f"{errors:g} standard errors" if errors else "0"
            reason = f"the trace of {name}, {mean:.4g} +- {error:.2g}, is not above {bound}"
            break
    fields = dict(zip(PARTS, means.tolist(), strict=True))
    parts = BalancedTrace(value=None, standard_error=None, **fields, covariance=covariance.tolist(), reason=reason)
    whole = balanced_trace(parts)
    return parts if whole is None else parts.model_copy(update=whole.model_dump())


def squared_norms(parameters: dict[str, torch.nn.Parameter], positions: int) -> dict[str, float]:
    """||theta_p||^2 of each tensor in R, by name, after the shift convention.

    Args:
        positions: rows of the position table that sentences read.
    """
    tensors = {name: parameter.detach().double() for name, parameter in parameters.items()}
    tensors[POSITIONS] = tensors[POSITIONS][:positions]
    means = {name: tensors[name].mean(0) for name in (WORDS, POSITIONS)}
    tensors |= {name: tensors[name] - mean for name, mean in means.items()}
    tensors[TOKEN_TYPES] = tensors[TOKEN_TYPES][0] + sum(means.values())
    return {name: tensor.square().sum().item() for name, tensor in tensors.items()}


def constant_share(values: np.ndarray, sizes: np.ndarray, words: int, positions: int, errors: float) -> TracePart | None:
    """The share of the trace in constant directions, with its standard error by the delta method.

    Args:
        values: (n, 2), the traces of the token types and of all parameters; sizes as in `mean_and_covariance`.
        words: rows of the word table.
        positions: rows of the position table that sentences read.
        errors: standard errors by which the whole trace must be positive, as in `balance`; None is returned if it is not.
    """
    (token_types, whole), covariance = mean_and_covariance(values, sizes)
    if not whole > errors * math.sqrt(covariance[1, 1]):
        return None
    copies = 1 + 1 / words + 1 / positions
    gradient = np.array([1 / whole, -token_types / whole**2])
    error = math.sqrt(max(0.0, gradient @ covariance @ gradient))
    return TracePart(value=copies * token_types / whole, standard_error=copies * error)


def flatness_fields(
    values: np.ndarray, sizes: np.ndarray, parameters: dict[str, torch.nn.Parameter], positions: int, errors: float
) -> dict[str, Any]:
    """The fields of a record that this module defines: tensors, balanced, relative and constant_share.

    Args:
        values: (n, tensors) traces of the parameter tensors, in the order of `parameters`; sizes as in `mean_and_covariance`.
        positions: rows of the position table that sentences read.
        errors: as in `balance`.
    """
    names = list(parameters)
    norms = squared_norms(parameters, positions)
    parts = [part_of(name, parameter.dim()) for name, parameter in parameters.items()]
    by_part = np.stack([values[:, [part == name for part in parts]].sum(1) for name in PARTS], 1)  # (n, 4)
    whole = np.stack([values[:, names.index(TOKEN_TYPES)], values.sum(1)], 1)
    means, _ = mean_and_covariance(values, sizes)
    relative, variance = mean_and_covariance(values @ np.array([[norms[name]] for name in names]), sizes)
    return {
        "balanced": balance(by_part, sizes, errors),
        "relative": TracePart(value=relative.item(), standard_error=math.sqrt(variance.item())),
        "constant_share": constant_share(whole, sizes, len(parameters[WORDS]), positions, errors),
        "tensors": {
            name: TensorTrace(value=mean, squared_norm=norms[name], size=parameters[name].numel())
            for name, mean in zip(names, means.tolist(), strict=True)
        },
    }
