"""Speed of the linear probe against the naive method, which runs the frozen encoder in every epoch, and their agreement.

    bash scripts/benchmark.sh probes

In some seconds, with rough numbers:

    bash scripts/benchmark.sh probes --scale 0.02 --hidden-size 32 --layers 2 --only adamw

The task is B of --rule-path: 10,000 training and 2,000 validation sentences, 50 epochs of AdamW with the flags of the README.
The model has random weights, which suffice for speed and agreement. The naive method pads every sentence to --max_seq_length,
runs the encoder without gradients in each step, and trains torch.nn.Linear on its output. Its time is scaled from its first
steps and one forward pass of an evaluation. Its accuracy is that of all its steps on features computed once, which are the same
in each epoch. Rates are per CPU-second of all threads: with several (--cores) on a busy machine, waiting counts too.
"""

import argparse
import dataclasses
import functools
import math
import tempfile

import torch
import torch.nn.functional as F
from measure import Row, add_arguments, cpu_seconds, machine, number_text, report, use_cores
from transformers import get_scheduler

from pcfg.common.cli import positive_int, run_main
from pcfg.common.files import keyed_rng
from pcfg.grammar import Grammar, find_rules
from pcfg.labels import LabelledSentences, Labeller
from pcfg.sampler import Sampler
from pretraining.data.contexts import Contexts, from_texts
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.evaluation.downstream import DownstreamTrainingArguments
from pretraining.evaluation.features import hidden_features
from pretraining.evaluation.solvers import ProbeData, accuracy, choose_strength, fit_adamw, fit_lbfgs, linear_head, standardise
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

POSITIONS = 32  # --max_seq_length
HEAD_WIDTH = 64
SEED = 0
# The flags of the README, except the warm-up of short runs.
FLAGS = {
    **{"per_device_train_batch_size": 512, "learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0},
    **{"lr_scheduler_type": "polynomial", "num_train_epochs": 50, "eval_strategy": "steps", "eval_steps": 200},
}
WARMUP_STEPS = 50


@dataclasses.dataclass
class Bench:
    """A model, and the labelled sentences of both parts."""

    grammar: Grammar
    scale: float  # of the numbers of sentences
    hidden_size: int
    layers: int
    folder: str

    def __post_init__(self):
        numbers = {"training": max(40, round(10_000 * self.scale)), "validation": max(40, round(2000 * self.scale))}
        sentences = LabelledSentences(Sampler(self.grammar, POSITIONS - 2), Labeller(self.grammar, "B"), numbers, SEED, 5)
        vocabulary = Vocabulary([*SPECIAL_TOKENS, *self.grammar.words])
        rows = [sentences.draw(split) for split in numbers]
        self.contexts = [from_texts(list(part.texts()), vocabulary, "benchmark") for part in rows]
        labels = [torch.as_tensor(part.labels, dtype=torch.int64) for part in rows]
        occurring = torch.cat(labels).unique()  # the classes of a task, as the scripts number them
        self.labels = [torch.searchsorted(occurring, part) for part in labels]
        self.classes = len(occurring)
        heads = max(1, self.hidden_size // HEAD_WIDTH)
        torch.manual_seed(SEED)
        shape = (vocabulary.size, self.hidden_size, self.layers, heads, 4 * self.hidden_size)
        self.model = MaskedLM(ModelConfig(*shape, max_position_embeddings=POSITIONS)).eval()
        self.training = DownstreamTrainingArguments(output_dir=self.folder, use_cpu=True, **FLAGS)
        self.training.warmup_steps = min(WARMUP_STEPS, self.steps // 2)

    @functools.cached_property
    def data(self) -> ProbeData:
        """The features of both parts, computed once."""
        longest = int(max(part.lengths.max() for part in self.contexts))
        train, validation = (hidden_features(self.model, part, longest) for part in self.contexts)
        return ProbeData(train, self.labels[0], validation, self.labels[1], self.classes, POSITIONS * self.hidden_size)

    @property
    def steps(self) -> int:
        batches = math.ceil(len(self.labels[0]) / self.training.per_device_train_batch_size)
        return batches * int(self.training.num_train_epochs)

    @property
    def examples(self) -> int:
        """Training sentences times epochs."""
        return len(self.labels[0]) * int(self.training.num_train_epochs)


@torch.no_grad()
def padded_features(model, contexts: Contexts, rows) -> torch.Tensor:
    """Hidden states of sentences padded to all positions, concatenated, zeros at padding: (rows, positions x hidden)."""
    ids = torch.zeros(len(rows), POSITIONS, dtype=torch.int64)
    ids[:, : contexts.input_ids.shape[1]] = torch.from_numpy(contexts.input_ids)[rows]
    mask = torch.arange(POSITIONS) < torch.from_numpy(contexts.lengths)[rows][:, None]
    return (model.encode(ids, mask) * mask[..., None]).flatten(1)


def naive_probe(features_of, labels, width: int, classes: int, training, total_steps: int, steps: int | None = None):
    """The head after the first `steps` of `total_steps` of AdamW, on features_of(batch); all for None."""
    head = linear_head(width, classes, SEED)
    groups = [{"params": [head.weight], "weight_decay": training.weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, eps=training.adam_epsilon)
    scheduler = get_scheduler(training.lr_scheduler_type, optimizer, training.warmup_steps, total_steps)
    step = 0
    epoch = 0
    while step < (total_steps if steps is None else steps):
        order = torch.from_numpy(keyed_rng(SEED, "probe-order", epoch).permutation(len(labels)))
        for batch in order.split(training.per_device_train_batch_size)[: (steps or total_steps) - step]:
            optimizer.zero_grad()
            F.cross_entropy(head(features_of(batch)), labels[batch]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), training.max_grad_norm)
            optimizer.step()
            scheduler.step()
            step += 1
        epoch += 1
    return head


def adamw_rows(bench: Bench) -> list[Row]:
    (train, validation), (labels, validation_labels) = bench.contexts, bench.labels
    sizes = (POSITIONS * bench.hidden_size, bench.classes, bench.training, bench.steps)
    padded_features(bench.model, train, torch.arange(2))  # the first call starts the threads

    start = cpu_seconds()
    data = bench.data
    encoding = cpu_seconds() - start
    head, _ = fit_adamw(data, bench.training, SEED)
    ours = accuracy(head, data.validation_features, validation_labels)
    seconds = cpu_seconds() - start

    batches = torch.arange(len(labels)).split(bench.training.per_device_train_batch_size)
    naive_steps = min(2, bench.steps)
    timed = len(batches[0])
    start = cpu_seconds()
    naive_probe(lambda rows: padded_features(bench.model, train, rows), labels, *sizes, naive_steps)
    naive_seconds = (cpu_seconds() - start) / naive_steps * bench.steps
    start = cpu_seconds()
    padded_features(bench.model, train, batches[0])
    naive_encoding = timed / (cpu_seconds() - start)
    evaluations = math.ceil(bench.steps / FLAGS["eval_steps"])  # the last one at the end
    naive_seconds += evaluations * len(validation_labels) / naive_encoding

    features = torch.cat([padded_features(bench.model, train, rows) for rows in batches])
    naive_head = naive_probe(lambda rows: features[rows], labels, *sizes)
    parts = torch.arange(len(validation_labels)).split(timed)
    right = [naive_head(padded_features(bench.model, validation, rows)).argmax(-1) == validation_labels[rows] for rows in parts]
    naive = torch.cat(right).float().mean().item()
    differing = (data.features - features[:, : data.features.shape[1]]).abs().max().item()

    note = (
        f"{len(labels):,} sentences, {bench.training.num_train_epochs:g} epochs, the {len(validation_labels):,} validation "
        f"sentences measured every {FLAGS['eval_steps']} steps, {encoding / seconds:.0%} of the time in the encoder; baseline: "
        f"{number_text(naive_seconds)} CPU-s, scaled from {naive_steps} steps and a forward pass of {timed} sentences"
    )
    agreement = f"{100 * ours:.2f}% against {100 * naive:.2f}%, same seed; features differ by {number_text(differing)} at most"
    unit = "sentences x epochs/CPU-s"
    total = len(labels) + len(validation_labels)
    difference = 100 * abs(ours - naive)
    return [
        Row("linear probe by AdamW", bench.examples / seconds, unit, bench.examples / naive_seconds, goal_ratio=100, note=note),
        Row("its features", total / encoding, "sentences/CPU-s", naive_encoding),
        Row("its accuracy, difference", difference, "points", goal=0.5, smaller_is_better=True, note=agreement),
    ]


def lbfgs_rows(bench: Bench) -> list[Row]:
    features = (bench.data.features.clone(), bench.data.validation_features.clone())
    data = dataclasses.replace(bench.data, features=features[0], validation_features=features[1])
    start = cpu_seconds()
    standardise(data)
    strength = choose_strength([(data.features, data.labels)], data.classes, SEED)
    optimum = fit_lbfgs(data.features, data.labels, data.classes, strength)
    seconds = cpu_seconds() - start
    right = accuracy(optimum.head, data.validation_features, data.validation_labels)
    note = (
        f"choice of the strength (it is {strength:g}) and optimum, within {number_text(optimum.excess)} nats, without "
        f"features; accuracy {100 * right:.2f}%"
    )
    return [Row("linear probe by L-BFGS", seconds, "CPU-s", smaller_is_better=True, note=note)]


ROWS = {"adamw": adamw_rows, "lbfgs": lbfgs_rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark.sh probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(ROWS))
    parser.add_argument("--rule-path", default="rule_deep_mlm.txt", help="rules file, or a shipped grammar")
    parser.add_argument("--hidden-size", type=positive_int, default=512, help="of the model; default 512")
    parser.add_argument("--layers", type=positive_int, default=12, help="of the model; default 12")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    rules = find_rules(options.rule_path).resolve()
    facts = machine("torch", "numpy", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Grammar.read(rules), options.scale, options.hidden_size, options.layers, folder)
        shape = f"{bench.model.config.parameters:,} parameters, hidden {options.hidden_size}, {options.layers} layers"
        print(f"measuring: {shape}", flush=True)
        rows = [row for name in options.only or ROWS for row in ROWS[name](bench)]
    report(rows, f"{rules.name} (sha256 {bench.grammar.sha256[:12]}), {shape}; {facts}", options.output)


if __name__ == "__main__":
    run_main(main)
