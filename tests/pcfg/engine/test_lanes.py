"""Vectors of numbers in kernels against numpy, their plain twin against both, and the cache of the kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

import pcfg
from pcfg.chart import Chart
from pcfg.common.files import keyed_rng
from pcfg.engine import lanes as vector_lanes
from pcfg.engine import plain_lanes
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.sampler import Sampler


def compiled(module):
    """Every operation of a module of lanes in one kernel, and its moves of bytes in another."""
    load, store, splat, move_chunk = module.load, module.store, module.splat, module.move_chunk
    multiply_add, multiply, divide, maximum, log = (
        getattr(module, name) for name in ("multiply_add", "multiply", "divide", "maximum", "log")
    )

    @njit
    def compute(x, y, z, results):
        for row in range(len(x)):
            a, b, c = load(x, row), load(y, row), load(z, row)
            store(results[0], row, multiply_add(a, b, c))
            store(results[1], row, multiply(a, b))
            store(results[2], row, divide(a, b))
            store(results[3], row, maximum(a, b))
            store(results[4], row, splat(x[row, 0]))
            store(results[5], row, log(a))

    @njit
    def move(target, place, source, begin):
        move_chunk(target, place, source, begin)

    return compute, move


KERNELS = {module.__name__.rsplit(".", 1)[1]: compiled(module) for module in (vector_lanes, plain_lanes)}


def numbers(dtype):
    rng = np.random.default_rng(0)
    # Odd first rows: numpy promises no more alignment than that of a number.
    lanes = plain_lanes.LANE_BYTES // np.dtype(dtype).itemsize
    x, y, z = np.exp(rng.uniform(-80, 80, (3, 1001, lanes))).astype(dtype)[:, 1:]
    x[:300] = 1 + rng.normal(size=(300, lanes)) * 1e-3
    return x, y.clip(1e-3, 1e3), z.clip(1e-3, 1e3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("module", KERNELS)
def test_each_lane_is_numpys_result(module, dtype):
    x, y, z = numbers(dtype)
    results = np.zeros((6, *x.shape), dtype)
    KERNELS[module][0](x, y, z, results)
    np.testing.assert_allclose(results[0], x.astype(np.longdouble) * y + z, rtol=2 * np.finfo(dtype).eps, atol=0)
    np.testing.assert_array_equal(results[1], x * y)
    np.testing.assert_array_equal(results[2], x / y)
    np.testing.assert_array_equal(results[3], np.maximum(x, y))
    np.testing.assert_array_equal(results[4], np.repeat(x[:, :1], x.shape[1], axis=1))
    expected = np.log(x.astype(np.longdouble))
    assert (np.abs(results[5] - expected) <= np.spacing(np.abs(expected).astype(dtype))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_twins_agree(dtype):
    arrays = numbers(dtype)
    vectors, plain = np.zeros((2, 6, *arrays[0].shape), dtype)
    KERNELS["lanes"][0](*arrays, vectors)
    KERNELS["plain_lanes"][0](*arrays, plain)
    np.testing.assert_array_equal(vectors[1:5], plain[1:5])  # the others may be fused, or rounded otherwise
    np.testing.assert_allclose(vectors, plain, rtol=2 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)


@pytest.mark.parametrize("module", KERNELS)
def test_the_logarithm_of_0_times_0_is_0(module):
    x = np.zeros((1, 16), np.float32)
    results = np.zeros((6, 1, 16), np.float32)
    KERNELS[module][0](x, x + 1, x, results)
    assert np.isfinite(results[5]).all()


@pytest.mark.parametrize("module", KERNELS)
def test_a_chunk_is_moved(module):
    source, target = np.arange(40, dtype=np.uint8), np.zeros(40, np.uint8)
    KERNELS[module][1](target, 3, source, 7)
    assert target.tolist() == [0] * 3 + list(range(7, 7 + plain_lanes.CHUNK)) + [0] * (37 - plain_lanes.CHUNK)


CHART = """
import sys
import numpy as np
import pcfg.engine.sweeps
from pcfg.chart import Chart
from pcfg.grammar import Grammar
assert pcfg.engine.sweeps.load is pcfg.engine.plain_lanes.load and "pcfg.engine.lanes" not in sys.modules
arrays = np.load(sys.argv[2])
chart = Chart(Grammar.read(sys.argv[1]), dtype="float64")
p, entropy, log_p, _ = chart.conditionals_and_reductions(arrays["tokens"], arrays["lengths"])
np.savez(sys.argv[3], p=p, entropy=entropy, log_p=log_p)
"""


def test_a_chart_of_plain_lanes_is_that_of_vectors(tmp_path):
    grammar = Grammar.read(RULES_FOLDER / "rule_mini_mlm.txt")
    tokens, lengths = Sampler(grammar, 16).sample(60, keyed_rng(0, "lanes"))
    np.savez(tmp_path / "text.npz", tokens=tokens, lengths=lengths)
    files = [str(path) for path in (RULES_FOLDER / "rule_mini_mlm.txt", tmp_path / "text.npz", tmp_path / "plain.npz")]
    subprocess.run([sys.executable, "-c", CHART, *files], check=True, env={**os.environ, "PCFG_LANES": "plain"})
    plain = np.load(tmp_path / "plain.npz")
    results = Chart(grammar, dtype="float64").conditionals_and_reductions(tokens, lengths)
    for name, expected in zip(("p", "entropy", "log_p"), results[:3], strict=True):
        np.testing.assert_allclose(plain[name], expected, rtol=1e-12, atol=1e-15)


def test_kernels_are_compiled_again_when_what_they_call_has_changed(tmp_path):
    sources = tmp_path / "pcfg"
    shutil.copytree(Path(pcfg.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__", "rules"))
    before = pcfg.kernel_cache(sources)
    assert before.name == pcfg.kernel_cache(Path(pcfg.__file__).parent).name
    assert os.environ["NUMBA_CACHE_DIR"] == str(pcfg.kernel_cache(Path(pcfg.__file__).parent))
    program = "import os, pcfg; print(os.environ['NUMBA_CACHE_DIR'])"
    for value, suffix in (("plain", "-plain"), ("", "")):
        environment = {**os.environ, "PCFG_LANES": value}
        printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == os.environ["NUMBA_CACHE_DIR"] + suffix
    (sources / "grammar.py").write_text("changed")
    assert pcfg.kernel_cache(sources) == before
    for kernels in ("engine/lanes.py", "common/words.py", "sampler.py"):
        before = pcfg.kernel_cache(sources)
        with open(sources / kernels, "a") as file:
            file.write("# changed")
        assert pcfg.kernel_cache(sources) != before


def test_the_first_compilation_says_so_once(tmp_path):
    kernel = tmp_path / "kernel.py"
    body = "@numba.njit(cache=True)\ndef add(a, b):\n    return a + b\n"
    kernel.write_text(f"import pcfg.common.words, numba\n{body}add(1, 2), add(1.0, 2.0)\n")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(pcfg.__file__).parents[1])}

    def errors():
        command = [sys.executable, kernel]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert errors() == "compiling kernels for this machine, once: up to a minute\n"
    assert errors() == ""
    kernel.write_text(kernel.read_text().replace("a + b", "a - b"))  # another kernel: the machine has been told
    assert errors() == ""
