import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from numba import njit

import pcfg
from pcfg.engine.lanes import divide, lanes, load, log, maximum, multiply, multiply_add, splat, store


@njit
def _compute(x, y, z, results):
    for row in range(len(x)):
        a, b, c = load(x, row), load(y, row), load(z, row)
        store(results[0], row, multiply_add(a, b, c))
        store(results[1], row, multiply(a, b))
        store(results[2], row, divide(a, b))
        store(results[3], row, maximum(a, b))
        store(results[4], row, splat(x[row, 0]))
        store(results[5], row, log(a))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_lane_is_numpys_result(dtype):
    rng = np.random.default_rng(0)
    # Odd first rows: numpy promises no more alignment than that of a number.
    x, y, z = np.exp(rng.uniform(-80, 80, (3, 1001, lanes(dtype)))).astype(dtype)[:, 1:]
    x[:300] = 1 + rng.normal(size=(300, lanes(dtype))) * 1e-3
    y, z = y.clip(1e-3, 1e3), z.clip(1e-3, 1e3)
    results = np.zeros((6, *x.shape), dtype)
    _compute(x, y, z, results)
    np.testing.assert_allclose(results[0], x.astype(np.longdouble) * y + z, rtol=2 * np.finfo(dtype).eps, atol=0)
    np.testing.assert_array_equal(results[1], x * y)
    np.testing.assert_array_equal(results[2], x / y)
    np.testing.assert_array_equal(results[3], np.maximum(x, y))
    np.testing.assert_array_equal(results[4], np.repeat(x[:, :1], lanes(dtype), axis=1))
    expected = np.log(x.astype(np.longdouble))
    assert (np.abs(results[5] - expected) <= np.spacing(np.abs(expected).astype(dtype))).all()


def test_the_logarithm_of_0_times_0_is_0():
    x = np.zeros((1, 16), np.float32)
    results = np.zeros((6, 1, 16), np.float32)
    _compute(x, x + 1, x, results)
    assert np.isfinite(results[5]).all()


def test_kernels_are_compiled_again_when_what_they_call_has_changed(tmp_path):
    sources = tmp_path / "pcfg"
    shutil.copytree(Path(pcfg.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__", "rules"))
    before = pcfg.kernel_cache(sources)
    assert before.name == pcfg.kernel_cache(Path(pcfg.__file__).parent).name
    assert os.environ["NUMBA_CACHE_DIR"] == str(pcfg.kernel_cache(Path(pcfg.__file__).parent))
    (sources / "grammar.py").write_text("changed")
    assert pcfg.kernel_cache(sources) == before
    for kernels in ("engine/lanes.py", "common/words.py", "sampler.py"):
        before = pcfg.kernel_cache(sources)
        with open(sources / kernels, "a") as file:
            file.write("# changed")
        assert pcfg.kernel_cache(sources) != before
