"""The sentences of documents packed into samples, in order and never across documents.

A sample takes sentences as long as they fit into its room: the tokens of a sample without [CLS] and [SEP]. With a probability
`short_seq_prob` (Devlin et al., arXiv 1810.04805, appendix A.2, and BERT's released code) a sample is a short one: its room is
uniform in 2 .. the full room. A sentence that fits into the full room is never cut; one that is longer begins a sample of its
own and is cut wherever one is full. No token is left out or used twice, so samples are slices of the text's ids.
"""

import numba
import numpy as np

from pcfg.common.files import InputError


def pack(lines: np.ndarray, room: int, short_seq_prob: float, rng: np.random.Generator) -> np.ndarray:
    """The lengths of the samples that a text is packed into.

    Args:
        lines: (lines,) int32 tokens of each sentence, negative for the end of a document; lines of 0 tokens count for nothing.
        room: tokens of a full sample, without [CLS] and [SEP].
        short_seq_prob: probability of a short sample.
        rng: a generator of its own for each text; it is used only where there are short samples.

    Returns:
        (samples,) int32 tokens of each sample, 1 or more.

    Raises:
        InputError: there is no room.

    >>> pack(np.array([3, 2, 4, -1, 1, 12]), 6, 0.0, np.random.default_rng(0)).tolist()
    [5, 4, 1, 6, 6]
    """
    if room < 1:
        raise InputError(f"--max_seq_length: {room + 2} leaves no room between [CLS] and [SEP]; give 3 or more")
    most = int(np.maximum(-(-lines // room), 0).sum())  # samples, if none had two sentences
    rooms = np.full(most, room, dtype=np.int32)
    if short_seq_prob > 0:
        is_short = rng.random(most) < short_seq_prob
        rooms[is_short] = rng.integers(min(2, room), room + 1, size=most, dtype=np.int32)[is_short]
    lengths = np.empty(most, dtype=np.int32)
    return lengths[: _pack(lines, room, rooms, lengths)].copy()


@numba.njit(cache=True, nogil=True)
def _pack(lines, room, rooms, lengths):
    """Fill `lengths` with the tokens of the samples; returns their number. `rooms` are those of the samples."""
    samples, filled = 0, 0
    for line in range(len(lines)):
        length = lines[line]
        if filled > 0 and (length < 0 or filled + length > rooms[samples]):
            lengths[samples] = filled
            samples, filled = samples + 1, 0
        while length > room:  # the sample is empty
            lengths[samples] = room
            samples, length = samples + 1, length - room
        filled += max(length, 0)
    if filled > 0:
        lengths[samples] = filled
        samples += 1
    return samples
