"""Packing, against a loop over sentences that are lists."""

import numpy as np
import pytest

from pretraining.data.sample_shards import pack


def naive(lines, room, rooms):
    """Samples as lists of (line, token), with the rooms that they are to have."""
    rooms, samples, open_sample = iter(rooms), [], []

    def close():
        if open_sample:
            samples.append(list(open_sample))
            open_sample.clear()

    now = next(rooms)
    for number, length in enumerate(lines):
        if length < 0:
            if open_sample:
                now = next(rooms)
            close()
            continue
        sentence = [(number, token) for token in range(length)]
        if open_sample and len(open_sample) + length > now:
            close()
            now = next(rooms)
        while len(sentence) > room:
            samples.append(sentence[:room])
            sentence = sentence[room:]
            now = next(rooms)
        open_sample.extend(sentence)
    close()
    return samples


@pytest.mark.parametrize("short_seq_prob", [0.0, 0.5, 1.0])
def test_against_a_loop(short_seq_prob):
    rng = np.random.default_rng(0)
    for case in range(200):
        lines = rng.choice([-1, 0, 1, 2, 3, 5, 8, 13, 40], size=rng.integers(0, 60)).astype(np.int32)
        room = int(rng.integers(1, 15))
        got = pack(lines, room, short_seq_prob, np.random.default_rng(case))
        most, again = int(np.maximum(-(-lines // room), 0).sum()), np.random.default_rng(case)
        rooms = [room] * most
        if short_seq_prob:
            is_short = again.random(most) < short_seq_prob
            drawn = again.integers(min(2, room), room + 1, size=most, dtype=np.int32)
            rooms = [int(drawn[i]) if is_short[i] else room for i in range(most)]
        expected = naive(lines.tolist(), room, [*rooms, room])
        assert got.tolist() == [len(sample) for sample in expected]
        # no token is left out or used twice, none is beside one of another document, and what fits isn't cut
        assert [token for sample in expected for token in sample] == [
            (line, token) for line, length in enumerate(lines) for token in range(max(length, 0))
        ]
        document = np.cumsum(lines < 0)
        for sample in expected:
            assert len(sample) <= room and len({document[line] for line, _ in sample}) == 1
        for line in np.flatnonzero((lines > 0) & (lines <= room)):
            assert sum(any(number == line for number, _ in sample) for sample in expected) == 1


def test_the_law_of_short_samples():
    lines = np.ones(400_000, dtype=np.int32)
    lengths = pack(lines, 10, 0.3, np.random.default_rng(1))[:-1]
    counts = np.bincount(lengths, minlength=11) / len(lengths)
    expected = np.array([0, 0, *[0.3 / 9] * 8, 0.7 + 0.3 / 9])
    assert np.abs(counts - expected).max() < 5 * np.sqrt(0.25 / len(lengths))


def test_nothing():
    assert pack(np.array([-1, 0, -1], dtype=np.int32), 5, 0.1, np.random.default_rng(0)).tolist() == []
