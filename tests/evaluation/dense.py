"""The full Fisher matrix and the full Hessian of a small model, through torch.func."""

import numpy as np
import torch
from torch.func import functional_call, grad, jacrev

from pretraining.evaluation.hessian import measured_parameters

VARIANTS = [(mode, norm) for mode in ("pre-ln", "post-ln") for norm in ("pytorch", "rms_norm")]


class Flat:
    """A model as a function of one vector of its measured parameters."""

    def __init__(self, model, contexts):
        self.model, self.contexts, parameters = model, contexts, measured_parameters(model)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.sizes = [parameter.numel() for parameter in parameters.values()]
        self.vector = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])

    def log_f(self, vector, batch):
        """(m, vocab_size) nats, of contexts (m,) of one length."""
        pieces = zip(self.shapes.items(), vector.split(self.sizes), strict=True)
        named = {name: piece.view(shape) for (name, shape), piece in pieces}
        inputs = self.contexts.batch(batch, "cpu")
        named["decoder_bias"] = self.model.decoder_bias.detach()
        return functional_call(self.model, named, inputs).log_softmax(-1)

    def weighted(self, labels, sentences):
        """(contexts, vocab_size): labels by their context's weight in the mean over sentences of the mean over positions."""
        counts = self.contexts.counts[self.contexts.sentence]
        weight = np.isin(self.contexts.sentence, sentences) / counts / len(sentences)
        return torch.from_numpy(weight)[:, None] * labels

    def fisher(self, labels):
        """sum_c weight_c sum_w labels_cw g g^T, g the gradient of log f_c[w]."""
        weighted, total = self.weighted(labels, range(len(self.contexts.lengths))), 0.0
        for context in range(len(labels)):
            gradients = jacrev(lambda vector, c=context: self.log_f(vector, np.array([c]))[0])(self.vector)
            total = total + gradients.T @ (weighted[context][:, None] * gradients)  # (parameters, parameters)
        return total

    def hessian(self, labels, sentences):
        """Of -sum_c weight_c sum_w labels_cw log f_c[w]; reverse over reverse, see `pretraining.evaluation.hessian`."""
        weighted, inside = self.weighted(labels, sentences), np.flatnonzero(np.isin(self.contexts.sentence, sentences))
        batches = self.contexts.batches(inside, len(inside))

        def loss(vector):
            return -sum((weighted[batch] * self.log_f(vector, batch)).sum() for batch in batches)

        return jacrev(grad(loss), chunk_size=256)(self.vector)

    def by_parameter(self, diagonal) -> dict[str, float]:
        return {name: piece.sum().item() for name, piece in zip(self.shapes, diagonal.split(self.sizes), strict=True)}

    def f(self):
        """(contexts, vocab_size)."""
        return torch.cat([self.log_f(self.vector, np.array([context])).exp() for context in range(len(self.contexts.label))])


def true_labels(contexts, truth, model):
    rows = truth.window(contexts, 0, len(contexts.lengths), model)
    return rows(np.arange(len(contexts.label)))


class OwnDistribution:
    """A lookup table that holds what a model says: f = P at every context."""

    def __init__(self, f, contexts):
        self.f, self.offsets = f.numpy(), contexts.offsets

    def conditionals(self, first, last):
        return self.f[self.offsets[first] : self.offsets[last]]
