"""Several seeds of a small model in one run: the members of a stack, whose tensors have an additional first axis.

A step of a small model is mostly overhead: of Python, of dispatch, of small kernels. `torch.func.vmap` runs the one model that
exists over all members, so each operation happens once for all of them. Every member has its own initial weights, order of
samples, masks, gradient norm and optimizer state: without dropout it equals the run of its own seed up to rounding.

DeepSpeed's engine has no part in it: one rank, float32.
"""

import argparse
import copy
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pcfg.common.files import InputError
from pretraining.data.contexts import concatenate
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.model.layers import SelfAttention, eager_attention
from pretraining.training.adversarial import AdversarialTerm, ridge_validation_loss
from pretraining.training.batches import (
    GlobalBatch,
    MicroBatch,
    Packing,
    by_length,
    count_masks,
    masked_loss,
    pack,
    portions,
    seed_dropout,
    sentence_lengths,
)
from pretraining.training.engine import build_optimizer
from pretraining.training.learner import Learner, Member, backward_pass
from pretraining.training.sam import ascent
from pretraining.training.state import SafeCheckpointEngine

ELEMENTWISE = ("adamw", "adam", "sgd")  # optimizers for which the extent of a tensor has no meaning
STATE_FILE = "stacked.pt"  # of a training state

# Multiply-adds of a layer's matrices in a forward pass of a member, up to which a stack of many members is 1.2 times as fast as
# members in turn. It grows with the square of the members beyond two.
MOST_PRODUCTS = 15e6
PRODUCTS_BY_MEMBERS = 2e6


def is_worth_stacking(config: ModelConfig, members: int, tokens: int) -> bool:
    """Whether `vmap` makes a step at least 1.2 times as fast as members in turn, by a rule that fits measurements on one core.

    What stacking saves is the overhead of operations, which is the same for all shapes. A layer has
    4 width^2 + 2 width x intermediate multiply-adds per token. With widths 16 to 128, 192 to 1,536 tokens and 2 to 16 members,
    the gains were 1.3 to 2.8 within the limit and 0.9 to 1.3 beyond it.

    Args:
        tokens: of a member in a forward pass, at most.

    >>> shape = {"vocab_size": 21, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 6}
    >>> is_worth_stacking(ModelConfig(hidden_size=32, intermediate_size=128, **shape), members=8, tokens=192)
    True
    >>> is_worth_stacking(ModelConfig(hidden_size=256, intermediate_size=1024, **shape), members=8, tokens=192)
    False
    """
    products = tokens * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    return members > 2 and products <= min(MOST_PRODUCTS, PRODUCTS_BY_MEMBERS * (members - 2) ** 2)


class Stack:
    """Weights and gradients of models of one shape, each parameter with the members as first axis.

    They lie in two buffers: weight decay is of matrices and tables alone. The models themselves become views of them.
    """

    def __init__(self, models: list[MaskedLM]):
        # Of views of a buffer. Copying them to satisfy the contract would take longer.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self.models = models
        self.base = copy.deepcopy(models[0]).to("meta").train()  # the structure, without weights
        for module in self.base.modules():
            if isinstance(module, SelfAttention):
                module.attend = eager_attention  # not every kernel of a GPU knows vmap
        self.leaves: dict[str, Tensor] = {}  # (members, *shape)
        self.weights: list[Tensor] = []  # (members, numbers): of matrices and tables; of the other parameters
        self.gradients: list[Tensor] = []  # the same
        for is_matrix in (True, False):
            names = [name for name, parameter in models[0].named_parameters() if (parameter.ndim >= 2) == is_matrix]
            stacked = [torch.stack([model.get_parameter(name).detach() for model in models]) for name in names]
            self.weights.append(torch.cat([tensor.flatten(1) for tensor in stacked], dim=1))
            self.gradients.append(torch.zeros_like(self.weights[-1]))
            sizes = [tensor[0].numel() for tensor in stacked]
            parts = zip(*(buffer.split(sizes, dim=1) for buffer in (self.weights[-1], self.gradients[-1])), strict=True)
            for name, tensor, (weights, gradients) in zip(names, stacked, parts, strict=True):
                weights = weights.view(tensor.shape)
                gradients = gradients.view(tensor.shape)
                for index, model in enumerate(models):
                    parameter = model.get_parameter(name)
                    parameter.data = weights[index]
                    parameter.grad = gradients[index]
                self.leaves[name] = weights.requires_grad_()
                self.leaves[name].grad = gradients

    def optimized(self, is_elementwise: bool) -> nn.Module:
        """The parameters for `build_optimizer`, which tells by their dimensions which of them decay.

        An elementwise optimizer has two: the buffers. Others have all parameters of all members.
        """
        if not is_elementwise:
            return nn.ModuleList(self.models)
        holder = nn.ParameterList([self.weights[0], self.weights[1].flatten()])
        for parameter, gradients in zip(holder, self.gradients, strict=True):
            parameter.grad = gradients.view(parameter.shape)
        return holder

    @torch.no_grad()
    def clip(self, most: float) -> None:
        """Scale each member's gradient to a norm of at most `most`, by the formula of DeepSpeed's engine."""
        norms = torch.stack([torch.linalg.vector_norm(buffer, dim=1) for buffer in self.gradients])  # (2, members)
        factors = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # (members,)
        for buffer in self.gradients:
            buffer *= factors[:, None]

    def clear_gradients(self) -> None:
        for buffer in self.gradients:
            buffer.zero_()

    def masked_losses(self, batch: MicroBatch) -> Tensor:
        """`masked_loss` of each member on its part of a batch whose tensors have the members as first axis: (members,)."""

        def loss(parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> Tensor:
            return masked_loss(lambda *inputs: functional_call(self.base, parameters, inputs), batch.of(tensors))

        return vmap(loss, randomness="different")(self.leaves, batch.tensors())

    def adversarial_losses(self, terms: list[AdversarialTerm], step: int) -> Tensor:
        """`AdversarialTerm.loss` of each member for its term, all of one file: (members,) float64."""
        term = terms[0]

        def features(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor | None) -> Tensor:
            hidden = functional_call(self.base, parameters, (ids, mask, None))
            return concatenate(hidden, mask, term.positions)  # (batch, positions * hidden)

        def encode(ids: Tensor, mask: Tensor | None) -> Tensor:
            axes = (0, 0, None if mask is None else 0)
            return vmap(features, axes, randomness="different")(self.leaves, ids, mask)

        parts = term.parts(np.stack([own.rows(step) for own in terms]), encode, self.weights[0].device)
        return vmap(ridge_validation_loss, (0, 0, 0, 0, None))(*parts, term.ridge)


def stacked_micro_batches(batches: Sequence[GlobalBatch], size: int, packing: Packing) -> list[MicroBatch]:
    """Micro-batches of all members at once, of at most `size` sentences each: tensors with the members as first axis.

    Args:
        batches: one per member, of equal size.
    """
    order, longest = by_length(np.stack([sentence_lengths(batch.samples, batch.rows) for batch in batches]))
    rows = [batch.rows[own] for batch, own in zip(batches, order, strict=True)]
    return [
        pack([(batch.samples, own[start:end]) for batch, own in zip(batches, rows, strict=True)], packing)
        for start, end in portions(longest, size, packing.most_tokens)
    ]


class StackedLearner(Learner):
    """The models of several seeds, each trained as the run of its own seed.

    One rank, float32. With `is_stacked`, `vmap` runs over the members; else they take turns within each step.
    """

    def __init__(self, options: argparse.Namespace, models: list[MaskedLM], device: torch.device, is_stacked: bool):
        self._options = options
        self._stack = Stack([model.to(device).train() for model in models])
        self._device = device
        self.packing = Packing.of(models[0].config, device, "float32")
        self._accumulate = self._together if is_stacked else self._in_turn
        parameters = self._stack.optimized(options.optimizer_type in ELEMENTWISE)
        self._optimizer = build_optimizer(options, parameters)

    def models(self) -> list[MaskedLM]:
        return self._stack.models

    def accumulate(self, step: int, batches: Sequence[GlobalBatch], members: Sequence[Member]) -> dict[str, Tensor]:
        losses = self._accumulate(step, batches, members)
        if self._options.sam_rho:
            with ascent(self._stack.weights, self._stack.gradients, self._options.sam_rho, per_member=True):
                self._stack.clear_gradients()
                self._accumulate(step, batches, members)
        return {name: loss.detach() for name, loss in losses.items()}

    def _together(self, step: int, batches: Sequence[GlobalBatch], members: Sequence[Member]) -> dict[str, Tensor]:
        # One stream for all: with dropout a member is a run of its own, another one than with --seed.
        first, *others = (member.stream for member in members)
        seed_dropout(first, "stacked dropout", step, *others)
        masks = torch.tensor([count_masks(batch.samples, batch.rows) for batch in batches], device=self._device)
        loss = torch.zeros(len(batches), device=self._device)
        for part in stacked_micro_batches(batches, self._options.train_micro_batch_size_per_gpu, self.packing):
            shares = self._stack.masked_losses(part.to(self._device)) / masks
            shares.sum().backward()
            loss += shares.detach()
        terms = [member.adversarial for member in members if member.adversarial is not None]
        if not terms:
            return {"loss": loss}
        adversarial_loss = self._stack.adversarial_losses(terms, step)
        (-self._options.adversarial_weight * adversarial_loss).sum().backward()
        return {"loss": loss, "adversarial_loss": adversarial_loss}

    def _in_turn(self, step: int, batches: Sequence[GlobalBatch], members: Sequence[Member]) -> dict[str, Tensor]:
        triples = zip(self.models(), batches, members, strict=True)
        losses = [backward_pass(self._options, model, step, batch, member, self.packing) for model, batch, member in triples]
        return {name: torch.cat([own[name] for own in losses]) for name in losses[0]}

    def step(self, lr: float) -> None:
        if self._options.gradient_clipping:
            self._stack.clip(self._options.gradient_clipping)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._stack.clear_gradients()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[MicroBatch]) -> Tensor:
        losses = torch.zeros(len(self.models()), dtype=torch.float64, device=self._device)
        for model in self.models():
            model.eval()
        for batch in batches:
            losses += torch.stack([masked_loss(model, batch.to(self._device)) for model in self.models()])
        for model in self.models():
            model.train()
        return losses

    def save(self, folder: Path) -> None:
        content = {"weights": self._stack.weights, "optimizer": self._optimizer.state_dict()}
        SafeCheckpointEngine().save(content, str(folder / STATE_FILE))

    @torch.no_grad()
    def load(self, folder: Path, files: dict[str, str]) -> None:
        if STATE_FILE not in files:
            raise InputError(f"{folder}: the state of a run of one seed; leave --seeds out, or take another state")
        content = SafeCheckpointEngine(files).load(str(folder / STATE_FILE), self._device)
        for buffer, weights in zip(self._stack.weights, content["weights"], strict=True):
            buffer.copy_(weights)
        self._optimizer.load_state_dict(content["optimizer"])
