"""The sentences of documents packed into samples, in order and never across documents.

A sample takes sentences as long as they fit into its room: the tokens of a sample without [CLS] and [SEP]. With probability
`short_seq_prob` (Devlin et al., arXiv 1810.04805, appendix A.2, and BERT's released code) a sample is short: its room is
uniform in 2 .. the full room. A sentence that fits into the full room is never cut; a longer one begins a new sample and is
cut wherever a sample is full. No token is left out or used twice, so samples are slices of the text's ids.
"""

import numba
import numpy as np

from pcfg.common.files import InputError


def pack(lines: np.ndarray, room: int, short_seq_prob: float, rng: np.random.Generator) -> np.ndarray:
    """The lengths of the samples of a text.

    Args:
        lines: (lines,) int32 tokens per sentence, negative at the end of a document; lines of 0 tokens have no effect.
        room: tokens of a full sample, without [CLS] and [SEP].
        short_seq_prob: probability of a short sample.
        rng: one generator per text; used only if there are short samples.

    Returns:
        (samples,) int32 tokens per sample, 1 or more.

    >>> pack(np.array([3, 2, 4, -1, 1, 12]), 6, 0.0, np.random.default_rng(0)).tolist()
    [5, 4, 1, 6, 6]
    """
    if room < 1:
        raise InputError(f"--max_seq_length: {room + 2} leaves no room between [CLS] and [SEP]; give 3 or more")
    max_samples = int(np.maximum(-(-lines // room), 0).sum())  # if no sample had two sentences
    rooms = np.full(max_samples, room, dtype=np.int32)
    if short_seq_prob > 0:
        is_short = rng.random(max_samples) < short_seq_prob
        rooms[is_short] = rng.integers(min(2, room), room + 1, size=max_samples, dtype=np.int32)[is_short]
    lengths = np.empty(max_samples, dtype=np.int32)
    return lengths[: _pack(lines, room, rooms, lengths)].copy()


@numba.njit(cache=True, nogil=True)
def _pack(lines, room, rooms, lengths):
    """Fill `lengths` with the tokens of the samples, whose rooms are `rooms`; returns their number."""
    samples = 0
    filled = 0
    for line in range(len(lines)):
        length = lines[line]
        if filled > 0 and (length < 0 or filled + length > rooms[samples]):
            lengths[samples] = filled
            samples += 1
            filled = 0
        while length > room:  # the sample is empty
            lengths[samples] = room
            samples += 1
            length -= room
        filled += max(length, 0)
    if filled > 0:
        lengths[samples] = filled
        samples += 1
    return samples
