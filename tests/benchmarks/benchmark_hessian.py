"""Time and memory of the trace of the Fisher matrix, against other estimators on the same model and text, in one run.

    bash scripts/benchmark.sh hessian

In some seconds, with rough numbers:

    bash scripts/benchmark.sh hessian --scale 0.01 --hidden-size 32 --layers 2

A pre-LN model with a vocabulary of 256 words is first trained on the grammar, one mask per sentence, close to its minimum
(minutes). Everything then runs in float32 on one thread, one masked position per sentence. The time to a standard error of 1%
of the trace is the time of one estimate, times its variance, divided by (1% of the trace)^2, since n independent estimates have
1/n of the variance. Time and variance are measured. An estimate of the other methods is one probe on one fresh batch of 8, 32
or 128 sentences: the size with the least time to 1%.
"""

import argparse
import dataclasses
import multiprocessing
from functools import partial
from pathlib import Path

import naive_hessian
import numpy as np
import torch
from measure import Row, add_arguments, cpu_seconds, machine, number_text, report, use_cores

from pcfg.common.cli import positive_int, run_main
from pcfg.common.files import keyed_rng
from pcfg.common.text import read_texts
from pcfg.grammar import RULES_FOLDER, Grammar, find_rules
from pcfg.sampler import Sampler
from pretraining.data.contexts import Contexts, from_texts
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.hessian import Partitions, Sampling, estimate_trace, mean_and_error, measured_parameters
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

ENTRIES = 256
HEADS = 4
TRAINING_STEPS = 1500
TRAINING_BATCH = 128
SENTENCES = 8000  # at --scale 1
ESTIMATES = 400  # at --scale 1
BATCHES = (8, 32, 128)  # of the baselines
BATCH = 128  # the default of calculate_hessian.py
HOUR = 3600
UNIT = "estimates to 1% per CPU-hour"


@dataclasses.dataclass
class Bench:
    """A trained model and text of its language."""

    rules: Path  # of the grammar
    scale: float  # of numbers of sentences and steps
    hidden_size: int
    layers: int

    def __post_init__(self):
        self.grammar = Grammar.read(self.rules)
        self.sampler = Sampler(self.grammar, 31)
        # More entries than the language has words, as for grammars whose words are some of BERT's vocabulary.
        others = [line for line in read_texts(RULES_FOLDER / "words.txt") if line.isalpha() and line not in self.grammar.words]
        self.vocabulary = Vocabulary([*SPECIAL_TOKENS, *self.grammar.words, *others][:ENTRIES])
        self.contexts = self.draw(self.amount(SENTENCES), "measured")
        self.model = self._trained()

    def amount(self, number: int) -> int:
        return max(16, round(number * self.scale))

    def draw(self, sentences: int, purpose: str) -> Contexts:
        """Every position of sentences of the grammar."""
        tokens, lengths = self.sampler.sample(sentences, keyed_rng(0, f"benchmark hessian, {purpose}"))
        words = self.grammar.words
        texts = [" ".join(words[word] for word in row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        return from_texts(texts, self.vocabulary, purpose)

    @staticmethod
    def one_each(contexts: Contexts) -> np.ndarray:
        """Indices of contexts: one random position of each sentence."""
        chance = keyed_rng(0, "benchmark hessian, positions").random(len(contexts.lengths))
        return contexts.offsets[:-1] + (chance * contexts.counts).astype(np.int64)

    def _trained(self) -> MaskedLM:
        """The model after AdamW on fresh sentences with one mask each, with a learning rate that falls to 0; in eval mode."""
        steps = max(2, round(TRAINING_STEPS * self.scale))
        contexts = self.draw(steps * TRAINING_BATCH, "training")
        torch.manual_seed(0)
        sizes = (self.vocabulary.size, self.hidden_size, self.layers, HEADS)
        shape = {"max_position_embeddings": self.sampler.width + 2, "attention": "eager"}
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = MaskedLM(ModelConfig(*sizes, 4 * self.hidden_size, **shape, **dropouts))
        optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = 0.06 * steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
        for batch in self.one_each(contexts).reshape(steps, TRAINING_BATCH):
            logits = model(*contexts.batch(batch, "cpu"))
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(contexts.label[batch]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval()


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of an estimator."""

    value: float  # of the trace
    error: float  # standard error in this run
    variance: float  # of one estimate
    seconds: float  # CPU-seconds of one estimate

    def to_one_percent(self, trace: float) -> float:
        """CPU-seconds to a standard error of 1% of `trace`."""
        return self.seconds * self.variance / (0.01 * trace) ** 2


def fisher_cost(bench: Bench, plain_labels: bool = False) -> Cost:
    """Of one masked position with one drawn label, by the method of calculate_hessian.py."""
    contexts = bench.contexts
    sampling = Sampling(nsamples=len(contexts.lengths), positions=1, plain_labels=plain_labels)
    start = cpu_seconds()
    values = estimate_trace("fisher", bench.model, contexts, sampling, batch_size=BATCH).values[:, :1]
    seconds = (cpu_seconds() - start) / len(values)
    mean, error = mean_and_error(values, np.ones(len(values)))
    return Cost(mean[0], error[0], values.var(ddof=1), seconds)


def batch_cost(bench: Bench, estimate, size: int) -> Cost:
    """Of one estimate of naive_hessian, on fresh batches of `size` sentences."""
    number = min(bench.amount(ESTIMATES), max(8, 16 * bench.amount(ESTIMATES) // size))
    contexts = bench.draw(number * size, f"{estimate.__name__} {size}")
    model = naive_hessian.AtMasks(bench.model, bench.vocabulary.pad_id)
    parameters = list(measured_parameters(bench.model).values())
    values: list[float] = []
    seconds = 0.0
    for batch in bench.one_each(contexts).reshape(number, size):
        ids, _, flat = contexts.batch(batch, "cpu")
        rows = torch.cat([ids, flat[:, None] % ids.shape[1]], 1)
        labels = torch.from_numpy(contexts.label[batch])
        if not values:
            estimate(model, parameters, rows, labels)  # the work of the first call only is not counted
        start = cpu_seconds()
        values.append(estimate(model, parameters, rows, labels))
        seconds += cpu_seconds() - start
    variance = np.var(values, ddof=1)
    return Cost(np.mean(values), np.sqrt(variance / number), variance, seconds / number)


def time_rows(bench: Bench) -> list[Row]:
    fisher = fisher_cost(bench)
    plain = fisher_cost(bench, plain_labels=True)
    baselines = {}
    for estimate in (naive_hessian.gauss_newton, naive_hessian.released, naive_hessian.hessian):
        costs = {size: batch_cost(bench, estimate, size) for size in BATCHES}
        baselines[estimate.__name__] = min(costs.items(), key=lambda pair: pair[1].to_one_percent(fisher.value))

    def row(what: str, ours: Cost, name: str, goal: float | None = None) -> Row:
        size, theirs = baselines[name]
        seconds = [cost.to_one_percent(fisher.value) for cost in (ours, theirs)]
        means = (f"{number_text(cost.value)} +- {number_text(cost.error)}" for cost in (ours, theirs))
        note = "{} CPU-seconds to 1% against {}, from estimates on batches of {}; the traces were {} and {}"
        note = note.format(*map(number_text, seconds), size, *means)
        return Row(f"trace, {what}", HOUR / seconds[0], UNIT, HOUR / seconds[1], goal_ratio=goal, note=note)

    return [
        row("against GGN-Hutchinson (curvlinops)", fisher, "gauss_newton", 6),
        row("against the released double backward", fisher, "released", 20),
        row("against Hutchinson on the Hessian (curvlinops)", fisher, "hessian"),
        row("--plain-labels, against GGN-Hutchinson", plain, "gauss_newton"),
    ]


def draw_rows(bench: Bench) -> list[Row]:
    """The cost of one more label for the same forward pass, in forward passes."""
    contexts = bench.contexts
    partitions = Partitions(bench.model)
    seconds = np.zeros(3)
    batches = contexts.batches(bench.one_each(contexts)[: bench.amount(4000)], BATCH)
    for number, batch in enumerate([batches[0], *batches]):
        inputs = contexts.batch(batch, "cpu")
        uniform = torch.rand(len(batch), dtype=torch.float64)
        times = [cpu_seconds()]
        with torch.no_grad():
            bench.model(*inputs)
        times.append(cpu_seconds())
        ghost = GhostNorms(bench.model, *inputs)
        times.append(cpu_seconds())
        words, weights = draw_words(ghost.f, uniform, residuals(ghost.f))
        partitions.stack(ghost(words)).mul_(weights[:, None])
        times.append(cpu_seconds())
        if number:  # the work of the first call only is not counted
            seconds += np.diff(times)
    forward, forward_for_labels, draw = seconds
    ratio = number_text(forward_for_labels / forward)
    note = f"the unit is a forward pass without gradients; the forward pass that labels need takes {ratio}"
    return [Row("a drawn label", draw / forward, "forward passes", goal=1.5, smaller_is_better=True, note=note)]


def _peak(name: str, model, rows, labels) -> float:
    """MiB of a batch: the peak of resident memory above the level before it, from the kernel."""
    torch.set_num_threads(1)
    parameters = list(measured_parameters(model).values())
    function = naive_hessian.AtMasks(model, 0)

    def ghost(rows, _):
        ids = rows[:, :-1]
        position = rows[:, -1]
        norms = GhostNorms(model, ids, ids != 0, torch.arange(len(ids)) * ids.shape[1] + position)
        norms(torch.zeros(len(ids), dtype=torch.int64))

    run = ghost if name == "ghost" else partial(getattr(naive_hessian, name), function, parameters)
    run(rows[:2], labels[:2])  # libraries allocate memory at their first call
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    run(rows, labels)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A size of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_rows(bench: Bench) -> list[Row]:
    """Of one batch, in a separate process."""
    batch = bench.one_each(bench.contexts)[: min(256, len(bench.contexts.lengths))]
    ids, _, flat = bench.contexts.batch(batch, "cpu")
    rows = torch.cat([ids, flat[:, None] % ids.shape[1]], 1)
    labels = torch.from_numpy(bench.contexts.label[batch])
    peaks = []
    for name in ("ghost", "released"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(_peak, (name, bench.model, rows, labels)))
    note = f"without libraries and model, {len(batch)} contexts at a time; the baseline is the released double backward"
    ours, baseline = peaks
    return [Row("peak memory of a batch", ours, "MiB", baseline, 0.6 * baseline, smaller_is_better=True, note=note)]


ROWS = {"time": time_rows, "draw": draw_rows, "memory": memory_rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark.sh hessian", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(ROWS))
    parser.add_argument(
        "--rule-path", default="rule_mini_mlm.txt", help="rules file, or a shipped grammar; default rule_mini_mlm.txt"
    )
    parser.add_argument("--hidden-size", type=positive_int, default=128, help="of the model; default 128")
    parser.add_argument("--layers", type=positive_int, default=4, help="of the model; default 4")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    torch.set_num_threads(1)
    facts = machine("torch", "curvlinops-for-pytorch", "numpy")
    print("training the model", flush=True)
    bench = Bench(find_rules(options.rule_path).resolve(), options.scale, options.hidden_size, options.layers)
    rows = []
    for name in options.only or ROWS:
        print(f"measuring: {name}", flush=True)
        rows += ROWS[name](bench)
    shape = f"{bench.model.config.parameters:,} parameters, hidden {options.hidden_size}, {options.layers} layers"
    report(rows, f"{bench.rules.name} (sha256 {bench.grammar.sha256[:12]}), {shape}; {facts}", options.output)


if __name__ == "__main__":
    run_main(main)
