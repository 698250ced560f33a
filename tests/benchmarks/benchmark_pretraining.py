"""Speed of masked-LM training, beside a plain loop over transformers' model measured in the same run.

    bash scripts/benchmark.sh pretraining

A version of a minute, with rough numbers:

    bash scripts/benchmark.sh pretraining --scale 0.1 --only compact

On a GPU, the README's encoder:

    bash scripts/benchmark.sh pretraining --bf16 --hidden-size 1024 --layers 16 --heads 16 --batch 4096 --micro-batch 4096

Rates are sentences per second of wall-clock time. All contenders train on the same samples of the grammar, padded to 32 tokens
in the file, with the same dropout, arithmetic and AdamW. They take turns, and the median of their turns counts. The baseline
and its variants are in naive_training.py. Goals are at dropout 0.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import Row, add_arguments, machine, number_text, report, run_script, use_cores
from naive_training import PlainLoop

from pcfg.common.cli import positive_int, run_main
from pcfg.grammar import find_rules
from pretraining.data.samples import Samples, read_samples
from pretraining.evaluation.loss import gap_meter
from pretraining.training import arguments as command_line
from pretraining.training.batches import GlobalBatch, Packing, count_masks, masked_loss, micro_batch, rank_micro_batches
from pretraining.training.engine import build_optimizer, cpu_has_bfloat16, start_ranks
from pretraining.training.pretrain import build_learner, build_model, load_data, run_facts
from pretraining.training.state import Progress
from pretraining.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
FULL_VOCABULARY = 30_522  # BERT's, uncased
LENGTH = 32
TURNS, SECONDS = 5, 4.0  # of each contender, at --scale 1
RATE = "sentences/s"
SEEDS = 8  # of the stacked models


class Bench:
    """Samples of the grammar, and the options that all contenders share.

    Args:
        options: of the command line.
        folder: for files.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.plain = {}  # rates of the plain loop, by vocabulary, arithmetic and dropout
        text, self.data = folder / "text", folder / "samples"
        number = max(4 * options.batch, round(100_000 * min(1.0, options.scale)))
        counts = ["--sentence-num", number, "--shard-num", 1, "--test-shard-num", 0]
        run_script(ROOT / "generate_pretraining.py", "--rule-path", options.rules, "--save-path", text, *counts)
        masks = ["--dup_factor", 1, "--vocab_file", "vocab.txt", "--max_seq_length", LENGTH, "--masked_lm_prob", 0.15]
        masks += ["--max_predictions_per_seq", 5, "--model_name", "bert-large-uncased"]
        run_script(ROOT / "generate_samples.py", "--dir", text, "-o", self.data, *masks)
        self.samples = read_samples(self.data / "train_shard_0.hdf5")
        self.device = start_ranks(self.training_options()).device

    def training_options(self, *flags) -> argparse.Namespace:
        """run_pretraining.py's options for the model and batches of the benchmark."""
        options = self.options
        model = ["--hidden_size", options.hidden_size, "--num_hidden_layers", options.layers]
        model += ["--num_attention_heads", options.heads, "--intermediate_size", 4 * options.hidden_size]
        files = ["--dataset_path", self.data, "--tokenizer_name", "bert-large-uncased", "--output_dir", self.folder / "models"]
        sizes = ["--train_batch_size", options.batch, "--train_micro_batch_size_per_gpu", options.micro_batch]
        schedule = ["--lr_schedule", "step", "--max_steps", 1_000_000, "--print_steps", 1_000_000, "--report_to", "none"]
        words = [*files, *model, *sizes, *schedule, *flags]
        return command_line.build_parser("").parse_args([str(word) for word in words])

    def trainer(self, vocab_size: int, job: str, *flags) -> Trainer:
        """The project's own trainer, on a model with `vocab_size` words."""
        options = self.training_options("--job_name", job, *flags)
        data, length = load_data(options, gap_meter)
        Path(options.output_dir, options.job_name).mkdir(parents=True, exist_ok=True)
        config = command_line.model_config(options, vocab_size, length)
        ranks = start_ranks(options)
        facts = run_facts(options, data, config, ranks)
        models = [build_model(config, member.seed) for member in data.members]
        return Trainer(options, build_learner(options, models, ranks, facts), ranks, data, facts, Progress())

    def train(self, trainer: Trainer, rows: Sequence[np.ndarray]) -> None:
        """A step of a trainer, on the rows of each of its members."""
        batches = [GlobalBatch(self.samples, own, index=0, is_last=False) for own in rows]
        trainer.follow_schedule()
        losses = trainer.learner.accumulate(trainer.progress.step, batches, trainer.members)
        trainer.learner.step(trainer.lr)
        trainer.advance(batches, losses)

    def plain_step(self, vocab_size: int, *flags):
        """The same model, batches and optimizer as the trainer's, in a loop without DeepSpeed."""
        options = self.training_options(*flags)
        model = build_model(command_line.model_config(options, vocab_size, LENGTH), 0).to(self.device).train()
        optimizer = build_optimizer(options, model)
        packing = Packing.of(model.config, self.device, "bfloat16" if options.bf16 else "float32")

        def step(rows):
            masks = count_masks(self.samples, rows)
            with torch.autocast(self.device.type, enabled=False):  # keeps the casts of the weights
                for part in rank_micro_batches(self.samples, rows, options.train_micro_batch_size_per_gpu, packing):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
                        loss = masked_loss(model, micro_batch(self.samples, part, packing).to(self.device))
                    (loss / masks).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def rates(self, contenders: dict) -> dict[str, float]:
        """Sentences per second of each contender's step(rows): the median of turns that alternate."""
        turns, seconds = max(1, round(TURNS * min(1.0, self.options.scale * 2))), SECONDS * self.options.scale
        batches = np.array_split(np.arange(len(self.samples)), len(self.samples) // self.options.batch)
        place, found = 0, {name: [] for name in contenders}
        for step in contenders.values():
            step(batches[0][: self.options.batch])
            self._wait()
        for _ in range(turns):
            for name, step in contenders.items():
                sentences, start = 0, time.perf_counter()
                while sentences == 0 or time.perf_counter() - start < seconds:
                    rows = batches[place % len(batches)][: self.options.batch]
                    step(rows)
                    sentences, place = sentences + len(rows), place + 1
                self._wait()
                found[name].append(sentences / (time.perf_counter() - start))
        return {name: statistics.median(values) for name, values in found.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, bf16: bool) -> float:
        """FLOP/s of a large matrix product: the best of some."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        size = 8192 if self.device.type == "cuda" else 2048
        one, other = torch.randn(2, size, size, device=self.device).to(dtype)
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            one @ other
            self._wait()
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds)


def useful_flops(samples: Samples, config) -> float:
    """Floating-point operations that a step needs for one sentence on average: forward, and twice that backward.

    Matrix products only. Each token goes through all layers but the last one, there through query, key and value; masked
    positions alone go through the rest of the last layer and the head. Padding counts for nothing.
    """
    tokens = samples.input_mask.sum(1, dtype=np.float64)
    masks = np.count_nonzero(samples.masked_lm_positions, axis=1)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    rest = width**2 + 2 * width * inner  # attention's output and feed-forward
    products = tokens * layers * 3 * width**2 + (tokens * (layers - 1) + masks) * rest
    attention = 2 * width * tokens * (tokens * (layers - 1) + masks)  # scores and their sums of values
    head = masks * (width**2 + width * config.vocab_size)
    return float(3 * 2 * (products + attention + head).mean())


def training_rows(bench: Bench, vocab_size: int, bf16: bool, dropout: float) -> list[Row]:
    name = f"{vocab_size:,} words, {'bfloat16' if bf16 else 'float32'}, dropout {dropout:g}"
    flags = ["--hidden_dropout_prob", dropout, "--attention_probs_dropout_prob", dropout, "--bf16", str(bf16).lower()]
    trainer = bench.trainer(vocab_size, f"{vocab_size}-{bf16}-{dropout}", *flags)
    config = trainer.learner.models()[0].config
    threads = torch.get_num_threads()

    def on_one_thread(rows: np.ndarray) -> None:
        torch.set_num_threads(1)
        bench.train(trainer, [rows])
        torch.set_num_threads(threads)

    autocast = torch.bfloat16 if bf16 else None
    contenders = {
        "ours": lambda rows: bench.train(trainer, [rows]),
        "loop": bench.plain_step(vocab_size, *flags),
        "plain": PlainLoop(config, bench.samples, bench.device, sparse=False, autocast=autocast).step,
        "sparse": PlainLoop(config, bench.samples, bench.device, sparse=True, autocast=autocast).step,
    }
    if threads > 1 and bench.device.type == "cpu":
        contenders["one thread"] = on_one_thread
    rates = bench.rates(contenders)
    trainer.metrics.close()
    bench.plain[vocab_size, bf16, dropout] = rates["plain"]
    flops = useful_flops(bench.samples, config)
    is_full = vocab_size == FULL_VOCABULARY

    def row(what: str, baseline: float, goal: float | None, note: str) -> Row:
        return Row(f"{name}, {what}", rates["ours"], RATE, baseline, goal_ratio=None if dropout else goal, note=note)

    plain_goal = (5 if bf16 else 8) if is_full else None
    sparse_goal = None if is_full else 3 if bf16 else 2
    padded = f"a plain loop over transformers' model, padded to {LENGTH} tokens"
    rows = [
        row("plain loop", rates["plain"], plain_goal, f"baseline: {padded}"),
        row("sparse loop", rates["sparse"], sparse_goal, "the same with logits at masked positions only"),
        row("without DeepSpeed", rates["loop"], 0.95, "the same step in a plain loop, without DeepSpeed, records and checks"),
    ]
    if "one thread" in rates:
        rows.append(row("one thread", rates["one thread"], 1, f"ours on one thread, against {threads}"))
    full = bench.plain.get((FULL_VOCABULARY, bf16, dropout))
    if full is not None and not is_full:
        note = "the grammar's own vocabulary in place of BERT's, as generate_pretraining.py writes it by default"
        rows.append(row(f"plain loop with {FULL_VOCABULARY:,}", full, 12, note))
    peak_goal = (0.07 if is_full else 0.12) if bf16 else 0.55
    note = f"baseline: product of two large matrices; {number_text(flops / 1e6)} million useful FLOPs a sentence"
    useful, peak = rates["ours"] * flops / 1e9, bench.peak(bf16) / 1e9
    rows.append(Row(f"{name}, peak", useful, "GFLOP/s", peak, goal_ratio=None if dropout else peak_goal, note=note))
    return rows


def variants(bench: Bench, vocab_size: int) -> list[Row]:
    """The rows of all arithmetics and dropouts."""
    return [
        row
        for bf16 in bench.options.bf16
        for dropout in bench.options.dropout
        for row in training_rows(bench, vocab_size, bf16, dropout)
    ]


def full_rows(bench: Bench) -> list[Row]:
    return variants(bench, FULL_VOCABULARY)


def compact_rows(bench: Bench) -> list[Row]:
    return variants(bench, int(bench.samples.attributes["vocab_size"]))


def stacked_rows(bench: Bench) -> list[Row]:
    """Small models of eight seeds in one run, next to one model after the other by DeepSpeed's engine."""
    size = int(bench.samples.attributes["vocab_size"])
    shape = ["--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--intermediate_size", 128]
    flags = [*shape, "--hidden_dropout_prob", 0, "--attention_probs_dropout_prob", 0]
    single = bench.trainer(size, "single", *flags)
    stacked = bench.trainer(size, "stacked", *flags, "--seeds", ",".join(map(str, range(SEEDS))))

    def in_turn(rows: np.ndarray) -> None:
        for own in np.array_split(rows, SEEDS):
            bench.train(single, [own])

    rates = bench.rates({"stacked": lambda rows: bench.train(stacked, np.array_split(rows, SEEDS)), "single": in_turn})
    for trainer in (single, stacked):
        trainer.metrics.close()
    note = (
        f"--seeds, hidden 32, 2 layers, batches of {bench.options.batch // SEEDS} without dropout; baseline: a run of one seed"
    )
    return [Row(f"training, {SEEDS} stacked seeds", rates["stacked"], RATE, rates["single"], goal_ratio=1.2, note=note)]


def startup_rows(bench: Bench) -> list[Row]:
    """Seconds from the start of run_pretraining.py to the end of a run of one step, the second time."""
    options = bench.training_options()
    command = [ROOT / "run_pretraining.py", "--dataset_path", bench.data, "--tokenizer_name", "bert-large-uncased"]
    command += ["--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--intermediate_size", 64]
    command += ["--train_batch_size", 64, "--lr_schedule", "step", "--max_steps", 1, "--output_dir", options.output_dir]
    seconds = []
    for run in range(3):
        start = time.perf_counter()
        run_script(*command, "--job_name", f"start{run}", "--report_to", "none")
        seconds.append(time.perf_counter() - start)
    note = "a run of one step of a small model, from the start of the process to its end, saved model and state included"
    return [Row("start of run_pretraining.py", statistics.median(seconds), "s", goal=20, smaller_is_better=True, note=note)]


ROWS = {"full": full_rows, "compact": compact_rows, "stacked": stacked_rows, "startup": startup_rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark.sh pretraining", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(ROWS))
    parser.add_argument("--rule-path", default="rule_deep_mlm.txt", help="rules file; default rule_deep_mlm.txt")
    for name, size in (("hidden-size", 256), ("layers", 4), ("heads", 4), ("batch", 256), ("micro-batch", 256)):
        parser.add_argument(f"--{name}", type=positive_int, default=size, help=f"default {size}")
    text = "bfloat16 alone; default: float32, and bfloat16 on GPUs and on CPUs that have instructions for it"
    parser.add_argument("--bf16", action="store_true", help=text)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0, 0.1], help="default 0 0.1")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    options.bf16 = [True] if options.bf16 else [False, True] if torch.cuda.is_available() or cpu_has_bfloat16() else [False]
    options.rules = find_rules(options.rule_path).resolve()
    folder = Path(tempfile.mkdtemp())
    try:
        bench = Bench(options, folder)
        device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        shape = f"hidden {options.hidden_size}, {options.layers} layers, batches of {options.batch}"
        facts = f"{shape}, {device}; {machine('torch', 'deepspeed', 'transformers')}"
        rows = []
        for name in options.only or ROWS:
            print(f"measuring: {name}", flush=True)
            rows += ROWS[name](bench)
    finally:
        shutil.rmtree(folder)
    report(rows, f"{options.rules.name}; {facts}", options.output)


if __name__ == "__main__":
    run_main(main)
