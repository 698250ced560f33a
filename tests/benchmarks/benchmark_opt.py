"""Speed of a language model's exact masked conditionals against one forward pass per candidate, measured in the same run.

    bash scripts/benchmark.sh opt

This takes about five minutes. A version of a few seconds, with rough numbers:

    bash scripts/benchmark.sh opt --scale 0.1 --only tiny

Rates are positions per second of wall-clock time, on --cores cores, for sentences of 23 tokens (no end factor) over 2,000 kept
tokens. The models are OPTs with random weights, one of OPT-125M's shape. The engine computes every candidate of some positions,
spread evenly over the sentence. The baseline is one forward pass of the whole sentence per candidate, without a cache. It is
timed on a few candidates of the same positions and scaled to all of them, with one thread and with one per core; the faster
counts.
"""

import dataclasses
import time

import numpy as np
import torch
from measure import Row, cpu_seconds, measure_settings, number_text
from naive_conditionals import SubstituteEachWord
from transformers import OPTConfig, OPTForCausalLM

from pcfg.common.cli import run_main
from pcfg.common.files import keyed_rng
from pretraining.sources.opt.causal_lm import RestrictedLM
from pretraining.sources.opt.conditionals import LogJoints, MaskedTexts, conditionals

GOAL = 20
KEPT, LENGTH, END = 2000, 23, 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, and the amount of work timed at --scale 1.

    Attributes:
        what: the row's name.
        shape: hidden size, layers, heads.
        positions: timed on the engine.
        candidates: timed on the baseline, at each position.
    """

    what: str
    shape: tuple[int, int, int]
    positions: int
    candidates: int


SETTINGS = {
    "tiny": Setting("64 wide, 2 layers", (64, 2, 2), 23, 60),
    "small": Setting("256 wide, 4 layers", (256, 4, 4), 23, 60),
    "125m": Setting("OPT-125M's shape", (768, 12, 12), 5, 40),
}


def make_model(setting: Setting) -> OPTForCausalLM:
    width, layers, heads = setting.shape
    torch.manual_seed(0)
    shape = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return OPTForCausalLM(OPTConfig(vocab_size=50_272, num_hidden_layers=layers, num_attention_heads=heads, **shape)).eval()


def measure(setting: Setting, scale: float, cores: int) -> Row:
    positions = max(2, round(setting.positions * scale))
    few = max(2, round(setting.candidates * scale))
    rng = keyed_rng(0, "benchmark-opt")
    model = make_model(setting)
    kept = rng.choice(np.arange(4, 50_272), KEPT, replace=False).tolist()
    sentence = rng.integers(KEPT, size=LENGTH)
    places = ((np.arange(positions) + 0.5) * LENGTH / positions).astype(int)
    texts, which = MaskedTexts.of(sentence, np.array([LENGTH]), np.zeros(positions, int), places)
    joints = LogJoints(RestrictedLM(model, kept, END, END, LENGTH), texts)
    joints.compute(0, 8)  # a first call is slower
    started = time.perf_counter()
    started_cpu = cpu_seconds()
    rows = np.concatenate([values for _, _, values in joints.compute_from(0)])
    p, _ = conditionals(rows.reshape(-1, KEPT))
    seconds = time.perf_counter() - started
    cpu = cpu_seconds() - started_cpu
    loop = SubstituteEachWord(model, kept, END, END, LENGTH)
    candidates = rng.choice(KEPT, few, replace=False)
    times = []
    baseline_p = []
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        loop.conditional(sentence.tolist(), 0, candidates[:1])
        started = time.perf_counter()
        started_cpu = cpu_seconds()
        baseline_p = [loop.conditional(sentence.tolist(), place, candidates) for place in places.tolist()]
        times.append((time.perf_counter() - started, cpu_seconds() - started_cpu))
    torch.set_num_threads(cores)
    among = p[which][:, candidates]
    difference = np.abs(np.log(among / among.sum(1, keepdims=True)) - np.log(baseline_p)).max()
    baseline, baseline_cpu = (spent * KEPT / few for spent in min(times))
    operations = joints.operations(0, joints.rows)
    each = min(times)[0] / positions / few
    rates = f"{number_text(operations / seconds / 1e9)} GFLOP/s against {number_text(matrix_rate())} of a matrix product"
    note = (
        f"{positions} positions; baseline on {few} candidates of each, {number_text(each * 1000)} ms each; {rates}; "
        f"CPU-seconds per position {number_text(cpu / positions)} against {number_text(baseline_cpu / positions)}, a ratio of "
        f"{number_text(baseline_cpu / cpu)}; log P of the same candidates differ by {difference:.1e} at most"
    )
    unit = f"positions/s on {cores} cores"
    return Row(f"exact conditionals, {setting.what}", positions / seconds, unit, positions / baseline, None, GOAL, note)


def matrix_rate() -> float:
    """GFLOP/s of a product as large as those of OPT-125M's feed-forward layers."""
    inputs = torch.randn(4096, 768)
    weight = torch.randn(3072, 768)
    torch.nn.functional.linear(inputs, weight)
    started = time.perf_counter()
    for _ in range(10):
        torch.nn.functional.linear(inputs, weight)
    return 10 * 2 * 4096 * 768 * 3072 / (time.perf_counter() - started) / 1e9


def main(arguments: list[str] | None = None) -> None:
    measure_settings("opt", __doc__, SETTINGS, measure, arguments)


if __name__ == "__main__":
    run_main(main)
