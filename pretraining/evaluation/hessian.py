"""The trace of the Hessian of the pre-training loss at a model: how flat the loss is there.

fisher (default), the estimator of Liu et al. 2023, appendix B.1:

    Tr = E_{x,t} E_{w ~ f(x_-t)} || grad_theta log f(x_-t)[w] ||^2

which equals Tr[grad^2 L] where f equals the true conditionals at every context, since there the gradient's covariance
equals the Hessian (Bartlett's second identity). Labels w are drawn from the model.

hutchinson (Hutchinson 1990), right at every theta: Tr[grad^2 L] = E_v[ v^T (grad^2 L) v ], v uniform in {-1, 1}^parameters,
with L the loss of a block of sentences; true conditionals, where they are known, take the place of the drawn labels.

In both the mean is over sentences of the mean over their (masked) positions. The parameters are all but the decoder's bias
(as in the released code; the model has no pooler), the tied word table counted once.
"""

import time

import numpy as np
import torch
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from pcfg.artefacts import InputError, keyed_rng
from pcfg.means import mean_by_sentences
from pretraining.evaluation.contexts import Contexts, check_length

LEFT_OUT = ("decoder_bias",)
# Per-sample gradients of one chunk: what `fisher_norms` may hold at a time, in bytes.
CHUNK_BYTES = 256 << 20


def measured_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters that the trace is over, by name, without those in `LEFT_OUT`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name not in LEFT_OUT}


def draw_labels(model, contexts: Contexts, uniform: np.ndarray, batch_size: int) -> np.ndarray:
    """Words drawn from the model at each context by inverting the cumulative distribution.

    Args:
        uniform: (contexts, draws) numbers in [0, 1); they alone decide the draw, whatever the batches.

    Returns:
        (contexts, draws) int64 word ids.
    """
    device = next(model.parameters()).device
    labels = np.empty(uniform.shape, np.int64)
    with torch.no_grad():
        for chosen in contexts.batches(batch_size):
            probability = torch.softmax(model(*contexts.batch(chosen, device)).double(), -1)
            cumulative = probability.cumsum(-1)
            # Rounding may leave the last cumulative value below 1: scale to what is there, so no draw falls off the end.
            target = torch.from_numpy(uniform[chosen]).to(device) * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, target, right=True)
            labels[chosen] = drawn.clamp(max=probability.shape[1] - 1).cpu().numpy()
    return labels


def fisher_norms(model, contexts: Contexts, labels: np.ndarray, batch_size: int) -> np.ndarray:
    """|| grad_theta log f(x_-t)[w] ||^2 for each context and each of its drawn labels.

    Args:
        labels: (contexts, draws) word ids.
        batch_size: contexts of one length that are put together; cut into smaller chunks for large models.

    Returns:
        (contexts, draws) float64.
    """
    parameters = measured_parameters(model)
    rest = {name: parameter.detach() for name, parameter in model.named_parameters() if name in LEFT_OUT}
    device = next(model.parameters()).device

    def squared_norm(ids, mask, position, label):
        def log_likelihood(chosen_parameters):
            logits = functional_call(model, {**rest, **chosen_parameters}, (ids[None], mask[None], position[None]))
            return torch.log_softmax(logits[0], -1).gather(0, label[None])[0]

        return sum(gradient.square().sum() for gradient in grad(log_likelihood)(parameters).values())

    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    chunk = max(1, CHUNK_BYTES // size)
    norms = np.empty(labels.shape)
    for chosen in tqdm(contexts.batches(batch_size), desc="fisher", unit="batch", leave=False):
        ids, mask, flat = contexts.batch(chosen, device)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        position = flat % ids.shape[1]
        for draw in range(labels.shape[1]):
            label = torch.from_numpy(labels[chosen, draw]).to(device)
            values = vmap(squared_norm, chunk_size=chunk)(ids, mask, position, label)
            norms[chosen, draw] = values.double().cpu().numpy()
    return norms


def fisher_trace(model, contexts: Contexts, draws: int = 1, seed: int = 0, batch_size: int = 64, source="") -> dict:
    """The paper's estimator of the trace.

    Args:
        model: a `MaskedLM` in eval mode with eager attention, which `torch.func` can differentiate.
        draws: labels drawn from the model at each context.

    Returns:
        "value", "standard_error" (over sentences), "n" (sentences), "draws" (gradients taken), "parameters", "seconds".
    """
    check_length(contexts, model.config, source)
    started = time.monotonic()
    uniform = keyed_rng(seed, "hessian labels").random((len(contexts.label), draws))
    norms = fisher_norms(model, contexts, draw_labels(model, contexts, uniform, 1024), batch_size)
    value, error = mean_by_sentences(norms.mean(1), contexts.counts)
    return _result(model, float(value), float(error), len(contexts.lengths), norms.size, started)


def _result(model, value, error, n, draws, started) -> dict:
    return {
        "value": value,
        "standard_error": error,
        "n": n,
        "draws": draws,
        "parameters": sum(parameter.numel() for parameter in measured_parameters(model).values()),
        "left_out": list(LEFT_OUT),
        "seconds": time.monotonic() - started,
    }


def _block_loss(model, contexts: Contexts, chosen, targets, device):
    """The loss of a block: mean over its sentences of the mean over their contexts of -sum_w target_w log f_w."""
    log_f = torch.log_softmax(model(*contexts.batch(chosen, device)), -1)
    sentences = np.unique(contexts.sentence[chosen])
    weights = 1.0 / (contexts.counts[contexts.sentence[chosen]] * len(sentences))
    return -(torch.from_numpy(weights).to(log_f)[:, None] * targets.to(log_f) * log_f).sum()


def _targets(contexts: Contexts, chosen, vocab_size: int, table, columns) -> torch.Tensor:
    """(m, vocab_size): the true conditionals of the contexts, or the true words where no table is given."""
    targets = np.zeros((len(chosen), vocab_size))
    if table is None:
        targets[np.arange(len(chosen)), contexts.label[chosen]] = 1.0
    else:
        first, last = int(contexts.sentence[chosen[0]]), int(contexts.sentence[chosen[-1]])
        targets[:, columns] = table.conditionals(first, last + 1)
    return torch.from_numpy(targets)


def hutchinson_trace(
    model, contexts: Contexts, table=None, columns=None, draws: int = 4, seed: int = 0, block: int = 32, source=""
) -> dict:
    """Hutchinson's estimator of the trace of the Hessian of the loss, with Rademacher probes.

    Every block of `block` sentences has probes of its own, so that the blocks are independent and their spread holds both the
    probes' and the sentences' error.

    Args:
        model: a `MaskedLM` in eval mode with eager attention, which can be differentiated twice.
        table, columns: true conditionals of the sentences and their vocabulary ids; None to use the words that stand there.
        draws: probes a block.
        block: sentences a block; the last, smaller one counts by its size.

    Returns:
        As `fisher_trace`; "n" is the number of blocks.

    Raises:
        InputError: fewer than two blocks: there would be no standard error.
    """
    check_length(contexts, model.config, source)
    sentences = len(contexts.lengths)
    if sentences <= block:
        raise InputError(f"--bs: {block} sentences a block leave one block of {sentences}; give a smaller --bs")
    started, device = time.monotonic(), next(model.parameters()).device
    parameters = [parameter for name, parameter in model.named_parameters() if name not in LEFT_OUT]
    values, sizes, offsets = [], [], contexts.offsets
    for number, low in enumerate(tqdm(range(0, sentences, block), desc="hutchinson", unit="block", leave=False)):
        high = min(low + block, sentences)
        chosen = np.arange(offsets[low], offsets[high])
        targets = _targets(contexts, chosen, model.config.vocab_size, table, columns).to(device)
        loss = _block_loss(model, contexts, chosen, targets, device)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        total = 0.0
        for draw in range(draws):
            rng = keyed_rng(seed, "hutchinson probes", number, draw)
            probe = [
                torch.from_numpy(rng.integers(0, 2, tuple(p.shape), np.int8) * 2 - 1).to(device, p.dtype) for p in parameters
            ]
            products = torch.autograd.grad(gradients, parameters, probe, retain_graph=draw + 1 < draws)
            total += sum((v * hv).sum(dtype=torch.float64) for v, hv in zip(probe, products, strict=True)).item()
        values.append(total / draws)
        sizes.append(high - low)
    values, sizes = np.array(values), np.array(sizes)
    mean = float((values * sizes).sum() / sizes.sum())
    # ratio estimator over blocks
    spread = (((values - mean) * sizes) ** 2).sum() * len(sizes) / (len(sizes) - 1)
    return _result(model, mean, float(np.sqrt(spread) / sizes.sum()), len(sizes), len(sizes) * draws, started)
