"""Speed of masked-LM training, beside a plain loop over transformers' model measured in the same run.

    bash scripts/benchmark.sh pretraining

A version of a minute, with rough numbers:

    bash scripts/benchmark.sh pretraining --scale 0.1 --only compact

On a GPU, the README's encoder:

    bash scripts/benchmark.sh pretraining --bf16 --hidden-size 1024 --layers 16 --heads 16 --batch 4096 --micro-batch 4096

Rates are sentences per second of wall-clock time. All contenders train on the same samples of the grammar, padded to 32 tokens
in the file, with dropout 0.1 and AdamW. They take turns, and the median of their turns counts. The baseline and its variants
are in naive_training.py.
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
        self.sizes = {}
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
        words = [*files, *model, *sizes, *schedule, *(["--bf16"] if options.bf16 else []), *flags]
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

    def plain_step(self, vocab_size: int):
        """The same model, batches and optimizer as the trainer's, in a loop without DeepSpeed."""
        options = self.training_options()
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

    def peak(self) -> float:
        """FLOP/s of a large matrix product, in the arithmetic of the contenders: the best of some."""
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
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


def training_rows(bench: Bench, what: str, vocab_size: int, goal_ratio: float | None) -> list[Row]:
    trainer = bench.trainer(vocab_size, f"v{vocab_size}")
    config = trainer.learner.models()[0].config

    arithmetic = torch.bfloat16 if bench.options.bf16 else None
    rates = bench.rates(
        {
            "ours": lambda rows: bench.train(trainer, [rows]),
            "loop": bench.plain_step(vocab_size),
            "plain": PlainLoop(config, bench.samples, bench.device, sparse=False, autocast=arithmetic).step,
            "sparse": PlainLoop(config, bench.samples, bench.device, sparse=True, autocast=arithmetic).step,
        }
    )
    trainer.metrics.close()
    bench.sizes[what] = rates
    peak, flops = bench.peak(), useful_flops(bench.samples, config)
    name = f"training, {vocab_size:,} words"
    padded = f"a plain loop over transformers' model, padded to {LENGTH} tokens"
    return [
        Row(name, rates["ours"], RATE, rates["plain"], goal_ratio=goal_ratio, note=f"baseline: {padded}"),
        Row(
            f"{name}, sparse baseline",
            rates["ours"],
            RATE,
            rates["sparse"],
            note="the same with logits at masked positions only",
        ),
        Row(
            f"{name}, DeepSpeed's overhead",
            rates["ours"],
            RATE,
            rates["loop"],
            goal_ratio=0.95,
            note="baseline: the same step in a plain loop, without DeepSpeed, records and checks",
        ),
        Row(
            f"{name}, useful arithmetic",
            rates["ours"] * flops / 1e9,
            "GFLOP/s",
            peak / 1e9,
            goal_ratio=0.45,
            note=f"baseline: product of two large matrices; {number_text(flops / 1e6)} million useful FLOPs a sentence",
        ),
    ]


def full_rows(bench: Bench) -> list[Row]:
    return training_rows(bench, "full", FULL_VOCABULARY, 12)


def compact_rows(bench: Bench) -> list[Row]:
    size = int(bench.samples.attributes["vocab_size"])
    rows = training_rows(bench, "compact", size, None)
    if "full" in bench.sizes:
        ours, plain = bench.sizes["compact"]["ours"], bench.sizes["full"]["plain"]
        what = f"training, {size} words, against the plain loop with {FULL_VOCABULARY:,}"
        note = "the grammar's own vocabulary in place of BERT's, as generate_pretraining.py writes it by default"
        rows.append(Row(what, ours, RATE, plain, goal_ratio=20, note=note))
    return rows


def stacked_rows(bench: Bench) -> list[Row]:
    """Small models of eight seeds in one run, next to one model after the other by DeepSpeed's engine."""
    size = int(bench.samples.attributes["vocab_size"])
    shape = ["--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--intermediate_size", 128]
    flags = [*shape, "--hidden_dropout_prob", 0, "--attention_probs_dropout_prob", 0, "--bf16", "false"]
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
    parser.add_argument("--bf16", action="store_true", help="bfloat16; default: where the CPU has instructions for it")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    options.bf16 = options.bf16 or (not torch.cuda.is_available() and cpu_has_bfloat16())
    options.rules = find_rules(options.rule_path).resolve()
    folder = Path(tempfile.mkdtemp())
    try:
        bench = Bench(options, folder)
        device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        shape = f"hidden {options.hidden_size}, {options.layers} layers, batches of {options.batch}"
        facts = (
            f"{shape}, {'bfloat16' if options.bf16 else 'float32'}, {device}; {machine('torch', 'deepspeed', 'transformers')}"
        )
        rows = []
        for name in options.only or ROWS:
            print(f"measuring: {name}", flush=True)
            rows += ROWS[name](bench)
    finally:
        shutil.rmtree(folder)
    report(rows, f"{options.rules.name}; {facts}", options.output)


if __name__ == "__main__":
    run_main(main)
