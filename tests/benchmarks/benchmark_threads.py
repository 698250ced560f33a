"""What the number of threads, and how they wait, cost on an idle machine and next to one busy process.

    bash scripts/benchmark.sh threads --only 64

The scripts run as users start them, on models of the given width. A rate is the inverse of the seconds in their records. The
rows "idle" compare with torch's default, all cores and libgomp's long spinning, in the same run; the rows "busy" compare the
same command next to one busy process with itself on the idle machine. Each is the best of three runs that take turns.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Row, add_arguments, machine, report, run_script, use_cores

from pcfg.common.cli import run_main
from pcfg.common.files import read_json
from pretraining.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WIDTHS = ("32", "128", "256")
DEFAULT = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"}  # of torch and libgomp on 2 cores; a user's own setting wins


class Works:
    """Training, trace, probe and fine-tuning of a model of some width: each returns its rate."""

    def __init__(self, folder: Path, width: int, scale: float):
        self.folder, self.width = folder, width
        self.steps, self.sentences = max(20, round(400 * scale * 32 / width)), max(50, round(400 * scale))
        self.text = folder / "text"
        counts = ["--sentence-num", 20_000, "--shard-num", 1, "--test-sentence-num", 1000]
        run_script(ROOT / "generate_pretraining.py", "--rule-path", "rule_mini_headroom.txt", "--save-path", self.text, *counts)
        masks = [
            "--vocab_file",
            "vocab.txt",
            "--max_seq_length",
            8,
            "--masked_lm_prob",
            0.2,
            "--model_name",
            "bert-large-uncased",
        ]
        run_script(ROOT / "generate_samples.py", "--dir", self.text, "-o", folder / "samples", "--dup_factor", 1, *masks)
        tasks = ["--task-type", "C", "--sentence-num", 2000, "--validation-num", 1000]
        run_script(ROOT / "generate_downstream.py", "--rule-path", "rule_mini_headroom.txt", "--save-path", self.text, *tasks)
        self.train(1)
        (self.model,) = (folder / "models/train1").glob("step*")

    def train(self, steps: int | None = None) -> float:
        steps = steps or self.steps
        shape = ["--hidden_size", self.width, "--num_hidden_layers", 2, "--num_attention_heads", 2]
        shape += ["--intermediate_size", 4 * self.width, "--train_batch_size", 128, "--train_micro_batch_size_per_gpu", 128]
        files = ["--dataset_path", self.folder / "samples", "--tokenizer_name", "bert-large-uncased"]
        files += ["--output_dir", self.folder / "models", "--job_name", f"train{steps}", "--overwrite", "--resume", "never"]
        schedule = ["--lr_schedule", "step", "--max_steps", steps, "--print_steps", max(1, steps // 2)]
        run_script(ROOT / "run_pretraining.py", *files, *shape, *schedule)
        return read_metrics(self.folder / f"models/train{steps}/metrics.jsonl")[-1]["sentences_per_second"]

    def _rate(self, pattern: str) -> float:
        (record,) = (self.folder / "records").rglob(pattern)
        return 1 / read_json(record)["seconds"]

    def trace(self) -> float:
        data = ["--datafile", self.text / "test0.txt", "--vocabfile", "vocab.txt", "--nsamples", self.sentences]
        where = ["--model-path", self.model, "--records-path", self.folder / "records", "--overwrite"]
        run_script(ROOT / "calculate_hessian.py", *where, *data)
        return self._rate("*hessian*.json")

    def _task(self, script: str, *flags: object) -> None:
        files = ["--train_file", self.text / "pcfg_C.csv", "--validation_file", self.text / "pcfg_C_validation.csv"]
        files += ["--records_path", self.folder / "records", "--model_name_or_path", self.model, "--overwrite"]
        run_script(ROOT / script, *files, "--max_seq_length", 8, "--num_train_epochs", 2, *flags)

    def probe(self) -> float:
        self._task("run_lp.py", "--per_device_train_batch_size", 128, "--do_train", "--do_eval")
        return self._rate("probe*.json")

    def finetune(self) -> float:
        self._task("run_ft.py", "--per_device_train_batch_size", 128, "--do_train", "--do_eval")
        return self._rate("finetune*.json")


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def default_threads() -> Iterator[None]:
    os.environ.update(DEFAULT)
    try:
        yield
    finally:
        for name in DEFAULT:
            del os.environ[name]


def rows_of(width: str, scale: float) -> list[Row]:
    """The rows of one width."""
    with tempfile.TemporaryDirectory() as folder:
        works = Works(Path(folder), int(width), scale)
        rows = []
        for name, unit in (("train", "sentences/s"), ("trace", "traces/s"), ("probe", "probes/s"), ("finetune", "runs/s")):
            rates: dict[str, list[float]] = {"idle": [], "default": [], "busy": []}
            for _ in range(3):
                for where, context in (("idle", contextlib.nullcontext), ("default", default_threads), ("busy", busy_process)):
                    with context():
                        rates[where].append(getattr(works, name)())
            idle, default, busy = (max(rates[where]) for where in ("idle", "default", "busy"))
            rows.append(Row(f"{name}, width {width}, idle", idle, unit, default, goal_ratio=0.8))
            rows.append(Row(f"{name}, width {width}, busy", busy, unit, idle, goal_ratio=1 / 3))
        return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark.sh threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(WIDTHS))
    options = parser.parse_args(arguments)
    use_cores(options.cores)
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]
    facts, rows = machine("torch"), []
    for width in options.only or WIDTHS:
        print(f"measuring: width {width}", flush=True)
        rows += rows_of(width, options.scale)
    report(rows, facts, options.output)


if __name__ == "__main__":
    run_main(main)
