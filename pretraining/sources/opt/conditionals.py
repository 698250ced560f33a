"""Exact masked conditionals of a restricted causal language model.

P is the joint probability of `pretraining.sources.opt.causal_lm`, s its start token, T the number of tokens of a sentence x,
and M the maximum. The conditional at position t is, over all kept tokens w,

    P(x_t = w | x_-t) = P(x with w at t) / sum_v P(x with v at t)

and, as the factors of x_<t are the same for all candidates, P(x with w at t) is proportional to

    J(w) = p(w | s, x_<t)  *  prod_{i=t+1..T} p(x_i | s, x_<t, w, x_t+1 .. x_i-1)  *  p(e | s, x_<t, w, x_>t) if T < M

One forward pass of s, x_<t gives the first factor of all candidates, and the keys and values that they share. The other
factors take one forward pass per candidate, of w and the tokens after it except the last; the last position of a sentence of M
tokens needs none. With n parameters and V candidates a sentence takes about 2 n V T^2 / 2 operations: 1e14 for OPT-125M at
V = 2,000 and T = 23. Candidates go through the model in batches of one (T, t), those of several contexts together if they are
few. The model computes in its own precision, each log p is float32, and sums over them are float64.
"""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pcfg.common.files import InputError
from pcfg.common.ranks import map_on_cores
from pcfg.common.words import padded
from pretraining.sources.opt.causal_lm import NO_CACHE, RestrictedLM

# Tokens per forward pass, by the kind of device. On a CPU, matrix products of 1,024 rows are as fast as larger ones, and their
# operands stay in its caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}


@dataclasses.dataclass(frozen=True)
class MaskedTexts:
    """The different contexts x_-t of some sentences, sorted by T, t and tokens."""

    tokens: np.ndarray  # (U, longest) int64 columns of a `RestrictedLM`, 0 at the masked position and beyond the end
    lengths: np.ndarray  # (U,) int64, T
    positions: np.ndarray  # (U,) int64, t, from 0

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(
        cls, flat: np.ndarray, lengths: np.ndarray, sentence: np.ndarray, position: np.ndarray
    ) -> tuple["MaskedTexts", np.ndarray]:
        """The contexts of M masked positions, and (M,) int64 the index of each position's context.

        Args:
            flat: columns of all sentences, one after the other; lengths: (n,) of each.
            sentence, position: (M,) the masked ones, positions from 0.

        >>> sentence, position = np.array([0, 1, 2]), np.array([0, 0, 0])
        >>> texts, which = MaskedTexts.of(np.array([3, 5, 4, 5, 5]), np.array([2, 2, 1]), sentence, position)
        >>> texts.tokens.tolist(), which.tolist()
        ([[0, 0], [0, 5]], [1, 1, 0])
        """
        tokens = padded(flat, lengths, 0)[sentence]
        tokens[np.arange(len(sentence)), position] = 0
        keys = np.column_stack([np.asarray(lengths)[sentence], position, tokens]).astype(np.int32)
        different, which = np.unique(keys, axis=0, return_inverse=True)
        different = different.astype(np.int64)
        return cls(different[:, 2:], different[:, 0], different[:, 1]), which.reshape(-1)

    def groups(self) -> np.ndarray:
        """(G + 1,) int64: contexts ends[g] .. ends[g + 1] - 1 have one T and one t."""
        changes = np.flatnonzero(np.diff(self.lengths) | np.diff(self.positions)) + 1
        return np.concatenate([[0], changes, [len(self)]])


class _SharedPrefix(DynamicLayer):
    """Keys and values of prefixes in one layer, for rows that share them; those of the input tokens are not stored."""

    def __init__(self, layer: Any, prefix: torch.Tensor):  # prefix: (rows,) int64, the prefix of each row
        super().__init__()
        self.keys = layer.keys  # (prefixes, heads, P, head width)
        self.values = layer.values
        self._prefix = prefix
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._before(self.keys, key_states), self._before(self.values, value_states)

    def _before(self, shared: Any, states: torch.Tensor) -> torch.Tensor:
        shared = shared.expand(len(states), -1, -1, -1) if len(shared) == 1 else shared[self._prefix]
        return torch.cat([shared, states], dim=-2)  # (rows, heads, P + L, head width)


def weight_number(model: torch.nn.Module) -> int:
    """Weights that each token is multiplied with: all matrices except embeddings."""
    modules = (module for module in model.modules() if not isinstance(module, torch.nn.Embedding))
    return sum(weight.numel() for module in modules for weight in module.parameters(recurse=False) if weight.dim() == 2)


class LogJoints:
    """log J(w) of all candidates w at each of some contexts, one batch at a time.

    Row u * V + w is candidate w of context u. Other batches do not affect the values of a batch; its first and last row affect
    them by rounding only.
    """

    def __init__(self, restricted: RestrictedLM, texts: MaskedTexts, batch_tokens: int | None = None):
        self.restricted = restricted
        self.texts = texts
        self.words = restricted.end  # V
        self.rows = len(texts) * self.words  # U * V
        self.batch_tokens = batch_tokens or BATCH_TOKENS[restricted.device.type]  # per forward pass
        # (U,) input tokens per candidate of each context: the factors of J except the first
        self.input_tokens = texts.lengths - texts.positions - (texts.lengths == restricted.max_tokens)
        # (2, U + 1): the first row of each context, and the input tokens of all rows before it
        tokens_before = np.concatenate([[0], np.cumsum(self.input_tokens)])
        self._tokens_before = np.stack([np.arange(len(texts) + 1), tokens_before]) * float(self.words)
        self._weights = weight_number(restricted.model)
        self._last = threading.local()

    def operations(self, first: int, last: int) -> float:
        """Additions and multiplications of the rows first .. last - 1, without those of attention scores and prefixes."""
        before_first, before_last = np.interp([first, last], *self._tokens_before)
        return 2.0 * self._weights * float(before_last - before_first)

    def _batches(self, first: int) -> Iterator[tuple[int, int]]:
        """First row and end of each batch from row `first` on; it ends with its (T, t), or when it has enough tokens."""
        groups = self.texts.groups()
        while first < self.rows:
            context = first // self.words
            group_end = int(groups[np.searchsorted(groups, context, side="right")])
            prefix = int(self.texts.positions[context]) + 1
            size = max(1, int(self.batch_tokens / (self.input_tokens[context] + prefix / self.words)))
            end = min(first + size, group_end * self.words)
            yield first, end
            first = end

    def compute_from(self, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first, last, `compute(first, last)`) of the batches from row `first` to the end, in order."""
        with map_on_cores(self.restricted.device) as run:
            yield from run(lambda batch: (*batch, self.compute(*batch)), self._batches(first))

    @torch.inference_mode()  # of the thread
    def compute(self, first: int, last: int) -> np.ndarray:
        """log J of the rows first .. last - 1, of contexts with one (T, t): (last - first,) float64 nats."""
        restricted = self.restricted
        contexts = slice(first // self.words, -(-last // self.words))
        log_prior, cache = self._shared(contexts)
        row = torch.arange(first, last, device=restricted.device)
        context = row // self.words - contexts.start
        word = row % self.words
        total = log_prior[context, word]
        targets = self._targets(contexts)[context]  # (rows, L)
        length = targets.shape[1]
        if length == 0:
            return total.cpu().numpy()
        layers = [_SharedPrefix(layer, context) for layer in cache.layers]
        attended = layers[0].get_seq_length() + length
        logits = restricted.model(
            input_ids=restricted.ids(torch.cat([word[:, None], targets[:, :-1]], dim=1)),
            attention_mask=torch.ones((len(row), attended), dtype=torch.int64, device=restricted.device),
            past_key_values=Cache(layers=cast(list, layers)),
            use_cache=True,
        ).logits
        log_p = restricted.log_probabilities(logits, first=False)  # (rows, L, V + 1)
        total += log_p.gather(2, targets[:, :, None])[:, :, 0].sum(dim=1, dtype=torch.float64)
        return total.cpu().numpy()

    def _targets(self, contexts: slice) -> torch.Tensor:
        """(contexts, L) int64: the tokens after the masked one and, if the sentence ended, the end token."""
        length = int(self.texts.lengths[contexts.start])
        position = int(self.texts.positions[contexts.start])
        targets = torch.from_numpy(self.texts.tokens[contexts, position + 1 : length]).to(self.restricted.device)
        if length < self.restricted.max_tokens:
            targets = torch.nn.functional.pad(targets, (0, 1), value=self.restricted.end)
        return targets

    def _shared(self, contexts: slice) -> tuple[torch.Tensor, DynamicCache]:
        """log p(w | s, x_<t), (contexts, V) float64, and keys and values of s, x_<t; each thread caches its last call."""
        if getattr(self._last, "contexts", None) == contexts:
            return self._last.shared
        restricted = self.restricted
        position = int(self.texts.positions[contexts.start])
        before = torch.from_numpy(self.texts.tokens[contexts, :position]).to(restricted.device)
        start = torch.full((len(before), 1), restricted.start_id, device=restricted.device)
        ids = torch.cat([start, restricted.ids(before)], dim=1)  # (contexts, P)
        cache = DynamicCache()
        output = restricted.model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        if cache.get_seq_length() != ids.shape[1]:
            raise InputError(NO_CACHE)
        log_p = restricted.log_probabilities(output.logits[:, -1], first=position == 0)
        self._last.contexts = contexts
        self._last.shared = (log_p[:, : self.words].double(), cache)
        return self._last.shared


def conditionals(log_joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(w), whose rows add up to 1, and log P(w), from log J(w): each (m, V) float64."""
    shifted = log_joint - log_joint.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.exp(log_p), log_p
