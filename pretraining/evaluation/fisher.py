"""Squared gradient norms of single contexts, || grad_theta log f(x_-t)[w] ||^2, without the gradients themselves.

One backward pass through a batch gives, for each context, the gradient G (T, out) at the output of every module. Together with
the module's input A (T, in) from the forward pass, it determines the norm of the gradient of each parameter ("ghost norms";
Goodfellow 2015, arXiv 1510.01799, for vectors; Li et al. 2022, arXiv 2110.05679, section 4, for sequences):

    matrix (out, in)        || G^T A ||^2 = sum_tt' (A A^T)_tt' (G G^T)_tt', by the cheaper side
    bias                    || sum_t G_t ||^2 = sum_tt' (G G^T)_tt'
    weight of a norm        || sum_t G_t * xhat_t ||^2, xhat the normalised input
    word table, as input    sum_tt' [x_t = x_t'] G_t . G_t'
      as the decoder        || o ||^2 || h ||^2, o = e_w - f the gradient at the logits, h the head's output
      their cross term      2 sum_t o[x_t] (h . G_t): the table is one parameter, its gradient the sum of the two
    position table          sum_t || G_t ||^2
    token-type table        || sum_t G_t ||^2, since every token is of type 0

In the last five, G is the gradient at the sum of the three embeddings. The forward pass and the A A^T serve any number of
words w. Each word has its own backward pass: one pass for several words (`is_grads_batched`) took the same time at 32 contexts
and up to 1.6 times as long at 256.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretraining.model.bert import MaskedLM

# From the gradient (m, length, out) at the output of a module to the norms (m,) of its parameters, by name.
Norms = Callable[[Tensor], dict[str, Tensor]]


def _gram(rows: Tensor) -> Tensor:
    """(m, length, width) -> (m, length, length): the inner products of the rows."""
    if rows.shape[-2] == 1:
        return rows.square().sum(-1, keepdim=True)  # a matrix product of single rows is slow
    return rows @ rows.transpose(-1, -2)


def _squared_sum(gradient: Tensor) -> Tensor:
    """(m, length, width) -> (m,): || sum over the length ||^2."""
    return gradient.sum(-2).square().sum(-1)


def _gram_is_cheaper(length: int, inputs: int, outputs: int) -> bool:
    """Whether || G^T A ||^2 takes fewer multiplications by inner products of positions."""
    return length * (inputs + outputs) < inputs * outputs


def _cross(gradient: Tensor, ids: Tensor, at_logits: Tensor, head: Tensor) -> Tensor:
    """(m,): inner product of the word table's gradient as the input (rows G_t at x_t) and as the decoder (o h^T)."""
    return (at_logits.gather(1, ids) * (gradient @ head[..., None])[..., 0]).sum(-1)


def _matrix_norms(name: str, module: nn.Linear, inputs: Tensor) -> Norms:
    """The norms of a linear module's weight and bias; `inputs` (m, length, in)."""
    outputs, width = module.weight.shape
    gram_of_inputs = _gram(inputs) if _gram_is_cheaper(inputs.shape[1], width, outputs) else None

    def norms(gradient: Tensor) -> dict[str, Tensor]:
        if gram_of_inputs is None:
            weight = (gradient.transpose(-1, -2) @ inputs).square().sum((-1, -2))
            bias = _squared_sum(gradient)
        else:
            gram = _gram(gradient)
            weight = (gram_of_inputs * gram).sum((-1, -2))
            bias = gram.sum((-1, -2))
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    return norms


def _norm_norms(name: str, module: nn.LayerNorm | nn.RMSNorm, inputs: Tensor) -> Norms:
    """The norms of the weight and bias of a LayerNorm, or of the weight of an RMSNorm; `inputs` (m, length, width)."""
    normalise: Callable[..., Tensor] = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
    normalised = normalise(inputs, module.normalized_shape, eps=module.eps)
    has_bias = getattr(module, "bias", None) is not None

    def norms(gradient: Tensor) -> dict[str, Tensor]:
        bias = {f"{name}.bias": _squared_sum(gradient)} if has_bias else {}
        return {f"{name}.weight": _squared_sum(gradient * normalised), **bias}

    return norms


class GhostNorms:
    """A forward pass of contexts, which then gives the gradient norms of any number of words at each of them."""

    def __init__(self, model: MaskedLM, ids: Tensor, mask: Tensor | None, flat: Tensor):
        """Inputs of a model in eval mode, from `Contexts.batch`: m rows, one masked position each."""
        self._words = model.embeddings.words
        self._ids = ids
        self._norms: dict[str, Tensor] = {}
        names = {module: name for name, module in model.named_modules()}
        modules = [module for module in names if isinstance(module, nn.Linear) or hasattr(module, "normalized_shape")]
        hooks = [model.embeddings.norm.register_forward_pre_hook(self._start_here)]
        hooks += [module.register_forward_hook(partial(self._record, names[module])) for module in modules]
        try:
            with torch.enable_grad():
                self._logits = model(ids, mask, flat)
        finally:
            for hook in hooks:
                hook.remove()
        # The model's distribution, (m, vocab_size) float64: 1 - f_w, the gradient of a likely word, is a small difference.
        self.f = self._logits.detach().double().softmax(-1)
        self._same = (ids[:, :, None] == ids[:, None, :]).to(self._logits.dtype)  # (m, length, length)

    def _start_here(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """The graph begins at the sum of the three embeddings."""
        self._sum = inputs[0].detach().requires_grad_()
        return (self._sum,)

    def _record(
        self, name: str, module: nn.Linear | nn.LayerNorm | nn.RMSNorm, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        """Keep a module's input. A hook on its output computes the norms during a backward pass.

        Each gradient is freed after use, which takes two thirds of the memory of holding them all.
        """
        rows = inputs[0].detach()
        rows = rows if rows.dim() == 3 else rows[:, None]
        part = _matrix_norms(name, module, rows) if isinstance(module, nn.Linear) else _norm_norms(name, module, rows)
        norms = self._norms  # not `self`, which holds the graph: the cycle through the graph would never be freed

        def take(gradient: Tensor) -> None:
            norms.update(part(gradient if gradient.dim() == 3 else gradient[:, None]))

        output.register_hook(take)
        self._head = output.detach()  # the last module is the norm of the head: (m, hidden)

    def __call__(self, words: Tensor) -> dict[str, Tensor]:
        """Squared gradient norms of log f[w], for one word w per context: (m,) int64.

        Returns (m,) for each name of `pretraining.evaluation.hessian.measured_parameters`, in the dtype of the model. Their sum
        over the names is the whole.
        """
        at_logits = -self.f
        at_logits[torch.arange(len(words), device=words.device), words] += 1
        at_logits = at_logits.to(self._logits.dtype)  # (m, vocab_size)
        (gradient,) = torch.autograd.grad(self._logits, self._sum, at_logits, retain_graph=True)
        norms = {**self._norms, **self._tables(gradient, at_logits)}
        self._norms.clear()
        return norms

    def _tables(self, gradient: Tensor, at_logits: Tensor) -> dict[str, Tensor]:
        """The norms of the three embedding tables, from the gradient (m, length, hidden) at their sum."""
        gram = _gram(gradient)  # (m, length, length)
        tables = {
            "embeddings.positions.weight": gram.diagonal(dim1=-2, dim2=-1).sum(-1),
            "embeddings.token_types.weight": gram.sum((-1, -2)),
        }
        if self._words.padding_idx is not None:  # the row of padding gets no gradient as an input
            gradient = gradient * (self._ids != self._words.padding_idx)[..., None]
            gram = _gram(gradient)
        as_input = (self._same * gram).sum((-1, -2))
        as_decoder = at_logits.square().sum(-1) * self._head.square().sum(-1)
        cross = _cross(gradient, self._ids, at_logits, self._head)
        return {**tables, "embeddings.words.weight": as_input + as_decoder + 2 * cross}


def residuals(f: Tensor) -> Tensor:
    """|| e_w - f ||^2 = (1 - f_w)^2 + sum_{v != w} f_v^2 of every word; f and result are (m, vocab_size) float64."""
    squares = f.square()
    return (1 - f).square() + (squares.sum(-1, keepdim=True) - squares).clamp(min=0)


def draw_words(probability: Tensor, uniform: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One word per row, and the weight of its value.

    Words are drawn by inverting a cumulative distribution: p itself, or one proportional to p_w s_w. Either way the expectation
    of weight times value is sum_w p_w value_w. Its variance is that of value_w / s_w. The squared gradient norm is
    || J (e_w - f) ||^2 with one matrix J per context, so that s_w = || e_w - f ||^2 leaves little variance.

    Args:
        probability: p, (m, vocab_size) float64.
        uniform: (m,) float64 numbers in [0, 1), which decide the draw, whatever the batch.
        sizes: s, (m, vocab_size) float64; None for 1.

    Returns:
        words (m,) int64, weights (m,) float64: sum_v p_v s_v / s_w.
    """
    cumulative = (probability if sizes is None else probability * sizes).cumsum(-1)
    # Rounding may leave the last value below 1: scaled to it, no draw falls off the end.
    total = cumulative[:, -1:]
    words = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp(max=probability.shape[1] - 1)
    weights = torch.ones_like(uniform) if sizes is None else (total / sizes.gather(1, words))[:, 0]
    return words[:, 0], weights
