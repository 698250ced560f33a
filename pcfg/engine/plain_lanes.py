"""The plain twin of `pcfg.engine.lanes`: the same functions over small numpy arrays, without anything of llvmlite.

PCFG_LANES=plain selects it. It is the reference in the tests, and a fallback if a new version of numba or llvmlite breaks the
vectors; conditionals take about 70 times as long.
"""

import numpy as np
from numba import njit

LANE_BYTES = 64  # of a vector
CHUNK = 16  # bytes that are moved at once


@njit
def load(array, row):
    return array[row].copy()


@njit
def store(array, row, value):
    array[row] = value


@njit
def splat(scalar):
    return np.full(LANE_BYTES // np.asarray(scalar).itemsize, scalar)


@njit
def multiply_add(first, second, third):
    return first * second + third


@njit
def multiply(first, second):
    return first * second


@njit
def divide(first, second):
    return first / second


@njit
def maximum(first, second):
    return np.where(first > second, first, second)


@njit
def log(value):
    return np.where(value > 0, np.log(value), value.dtype.type(-1e3))


@njit
def move_chunk(target, place, source, begin):
    target[place : place + CHUNK] = source[begin : begin + CHUNK]
