"""Hutchinson's estimator of the trace of the Hessian H of a loss: Tr H = E_v[ v^T H v ] (Hutchinson 1990).

v has independent entries of mean 0 and variance 1: uniform in {-1, 1} (Rademacher, the least variance: no diagonal entry of H
adds to it) or standard normal (the released code). H v is the gradient of (grad L)^T v, a second backward pass through the
graph of the first, which serves several probes. It needs attention in plain operations: fused kernels have no second
derivative, and forward over forward mode (`torch.func.jvp` of `jvp`) through `F.layer_norm` is silently wrong in torch 2.13.
"""

import numpy as np
import torch

from pcfg.common.files import keyed_rng
from pretraining.data.contexts import Contexts
from pretraining.evaluation.parts import measured_parameters

PROBES = {
    "rademacher": lambda rng, shape: rng.integers(0, 2, shape, np.int8) * 2 - 1,
    "gaussian": lambda rng, shape: rng.standard_normal(shape, np.float32),
}


def draw_probe(model, kind: str, seed: int, block: int, draw: int) -> list[torch.Tensor]:
    """The probe of a block and draw, one tensor for each of `measured_parameters(model)`, a function of the key alone."""
    rng = keyed_rng(seed, f"hutchinson probes, {kind}", block, draw)
    shapes = measured_parameters(model).values()
    return [torch.from_numpy(PROBES[kind](rng, tuple(p.shape))).to(p.device, p.dtype) for p in shapes]


def quadratic_forms(model, contexts: Contexts, batches: list[np.ndarray], targets, probes: list) -> np.ndarray:
    """v_p^T (H v)_p for each parameter p; their sum over p is v^T H v, the expectation of each the trace of p's own block.

    H is the Hessian of the loss -sum_c sum_w targets_cw log f_c[w], over the contexts c of all batches.

    Args:
        model: a `MaskedLM` in eval mode with eager attention.
        batches: contexts (m,), each batch of one length.
        targets: a function from such contexts to (m, vocab_size) on the model's device.
        probes: functions that return a probe v, as `draw_probe` does.

    Returns:
        (probes, parameters) float64.
    """
    parameters = list(measured_parameters(model).values())
    device = parameters[0].device
    forms = np.zeros((len(probes), len(parameters)))
    for batch in batches:
        log_f = torch.log_softmax(model(*contexts.batch(batch, device)), -1)
        loss = -(targets(batch).to(log_f.dtype) * log_f).sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        for draw, probe in enumerate(probes):
            vector = probe()
            products = torch.autograd.grad(gradients, parameters, vector, retain_graph=draw + 1 < len(probes))
            form = torch.stack([(v * hv).sum(dtype=torch.float64) for v, hv in zip(vector, products, strict=True)])
            forms[draw] += form.cpu().numpy()
    return forms
