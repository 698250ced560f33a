"""The plain twin of `pcfg.engine.lanes`: the same functions as loops over small numpy arrays, without anything of llvmlite.

PCFG_LANES=plain selects it. It is the reference in the tests, and a fallback if a new version of numba or llvmlite breaks the
vectors; conditionals take about 70 times as long.
"""

import numpy as np
from numba import njit

LANE_BYTES = 64  # of a vector
CHUNK = 16  # bytes that are moved at once


def lanes(dtype: np.dtype | type | str) -> int:
    """How many numbers of a dtype a vector has.

    >>> lanes(np.float32), lanes(np.float64)
    (16, 8)
    """
    return LANE_BYTES // np.dtype(dtype).itemsize


@njit
def load(array, row):
    return array[row].copy()


@njit
def store(array, row, value):
    for lane in range(value.size):
        array[row, lane] = value[lane]


@njit
def splat(scalar):
    return np.full(LANE_BYTES // np.asarray(scalar).itemsize, scalar)


@njit
def multiply_add(first, second, third):
    result = np.empty_like(first)
    for lane in range(first.size):
        result[lane] = first[lane] * second[lane] + third[lane]
    return result


@njit
def multiply(first, second):
    result = np.empty_like(first)
    for lane in range(first.size):
        result[lane] = first[lane] * second[lane]
    return result


@njit
def divide(first, second):
    result = np.empty_like(first)
    for lane in range(first.size):
        result[lane] = np.divide(first[lane], second[lane])  # which divides by 0, as vectors do
    return result


@njit
def maximum(first, second):
    result = np.empty_like(first)
    for lane in range(first.size):
        result[lane] = first[lane] if first[lane] > second[lane] else second[lane]
    return result


@njit
def log(value):
    result = np.empty_like(value)
    for lane in range(value.size):
        result[lane] = np.log(value[lane]) if value[lane] > 0 else -1e3
    return result


@njit
def move_chunk(target, place, source, begin):
    for offset in range(CHUNK):
        target[place + offset] = source[begin + offset]
