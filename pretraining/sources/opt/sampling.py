"""Sampling from a restricted causal model, and the choice of the tokens that it is restricted to: the most frequent ones."""

import contextlib
import functools

import numpy as np
import torch

from pcfg.common.executors import end_if_asked, run_jobs
from pcfg.common.files import InputError, keyed_rng
from pretraining.sources.opt.causal_lm import RestrictedLM
from pretraining.sources.opt.escaped_tokens import escape, why_excluded

# The way in which uniform numbers become tokens; to be changed with it, as it decides the bytes of the text.
DRAWING = "inverse cumulative probabilities, 1"
# Sentences of a job that counts tokens.
COUNTED_AT_ONCE = 500


@torch.inference_mode()
def sample(restricted: RestrictedLM, uniform: np.ndarray) -> np.ndarray:
    """Sentences by inverting cumulative probabilities, with a cache of keys and values; those that ended leave the batch.

    Args:
        uniform: (n, M) float64 in [0, 1); number [i, t] decides token t of sentence i. M is `restricted.max_tokens`.

    Returns:
        (n, M) int64 columns of `restricted`; `restricted.end` from a sentence's end on.

    Raises:
        InputError: the model has no such cache.
    """
    number, length = uniform.shape
    device, end = restricted.device, restricted.end
    draws = torch.as_tensor(uniform, device=device)
    tokens = torch.full((number, length), end, device=device)
    alive = torch.arange(number, device=device)
    fed, cache = torch.full((number, 1), restricted.start_id, device=device), None
    for place in range(length):
        mask = torch.ones((len(alive), place + 1), dtype=torch.int64, device=device)
        output = restricted.model(input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.get("past_key_values")
        if cache is None:
            raise InputError("--model-name: the model keeps no keys and values of earlier tokens; take a transformer")
        log_p = restricted.log_probabilities(output.logits[:, -1], first=place == 0)  # (alive, V + 1)
        chosen = invert(log_p.double().exp(), draws[alive, place])
        tokens[alive, place] = chosen
        going = (chosen != end).nonzero()[:, 0]
        if len(going) < len(alive):
            alive, chosen = alive[going], chosen[going]
            cache.batch_select_indices(going)
        if not len(alive):
            break
        fed = restricted.ids(chosen)[:, None]
    return tokens.cpu().numpy()


def invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first column up to which the probabilities add up to more than `uniform` times their sum.

    Args:
        probabilities: (n, W) float64, not negative; uniform: (n,) float64 in [0, 1).

    Returns:
        (n,) int64; never a column of probability 0.

    >>> invert(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 4).double(), torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53]).double())
    tensor([1, 1, 3, 3])
    """
    cumulative = probabilities.cumsum(dim=1)
    total = cumulative[:, -1]
    # The product may be rounded up to the total itself, which no sum exceeds.
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]


def _count(everything: RestrictedLM, seed: int, batch_size: int, job: tuple[int, int]) -> np.ndarray:
    """How often each column occurs in the sentences of one job, (number of the job, sentences)."""
    number, sentences = job
    rng = keyed_rng(seed, "language-model-frequencies", number)
    counts = np.zeros(everything.end + 1, dtype=np.int64)
    for first in range(0, sentences, batch_size):
        end_if_asked()
        uniform = rng.random((min(batch_size, sentences - first), everything.max_tokens))
        counts += np.bincount(sample(everything, uniform).ravel(), minlength=len(counts))
    return counts[:-1]


def count_tokens(
    model: torch.nn.Module, start_id: int, end_id: int, max_tokens: int, seed: int, sentences: int, batch_size: int, jobs: int
) -> np.ndarray:
    """How often each token of the model occurs in sentences sampled from it, with all its tokens.

    Args:
        sentences: how many; none is empty.
        batch_size: sentences at once.
        jobs: batches side by side, on threads.

    Returns:
        (model's vocabulary,) int64; 0 for the end token.
    """
    columns = np.delete(np.arange(model.config.vocab_size), end_id)
    everything = RestrictedLM(model, columns, start_id, end_id, max_tokens)
    blocks = [(i, min(COUNTED_AT_ONCE, sentences - first)) for i, first in enumerate(range(0, sentences, COUNTED_AT_ONCE))]
    counts = np.zeros(model.config.vocab_size, dtype=np.int64)
    function = functools.partial(_count, everything, seed, batch_size)
    with contextlib.closing(run_jobs(function, blocks, jobs, "token frequencies", "threads")) as counted:
        for _, found in counted:
            counts[columns] += found
    return counts


def choose_tokens(counts: np.ndarray, tokens: dict[int, bytes], number: int, end_id: int) -> tuple[list[int], list[str]]:
    """The most frequent tokens that can be words of the data, ties by id, and their pieces.

    Args:
        counts: (model's vocabulary,) how often each token was seen.
        tokens: the bytes of each token that is not special, by id.
        number: how many are wanted.

    Returns:
        kept: (number,) ids; pieces: (number,).

    Raises:
        InputError: there are not as many.
    """
    kept, pieces, taken = [], [], set()
    for index in np.argsort(-counts, kind="stable").tolist():
        token = tokens.get(index)
        if index == end_id or token is None or why_excluded(token) or token in taken:
            continue
        taken.add(token)
        kept.append(index)
        pieces.append(escape(token))
    if number > len(kept):
        raise InputError(
            f"--top-tokens {number}: the model has {len(kept):,} tokens that can be words (of {len(counts):,}; special tokens, "
            f"those with line breaks and second ones of the same bytes are none); give {len(kept)} or fewer"
        )
    return kept[:number], pieces[:number]
