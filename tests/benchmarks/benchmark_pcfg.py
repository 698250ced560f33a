"""Speed of the grammar engine, next to naive baselines measured in the same run.

    bash scripts/benchmark.sh pcfg

A version of some seconds, with rough numbers, and the memory of the generators (slow: 20 million sentences):

    bash scripts/benchmark.sh pcfg --scale 0.01 --only labels conditionals
    bash scripts/benchmark.sh pcfg --only memory --folder /a/disk/with/15/GB

Rates are sentences per CPU-second (all threads and child processes counted), except for text shards: sentences per second
of the clock with everything on --cores cores. Sentences are drawn from the grammar with the lengths it gives them. The
baselines, in naive.py, are timed on few of them, taken at equal steps of the list sorted by length.
"""

import argparse
import dataclasses
import multiprocessing
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from measure import (
    Row,
    add_arguments,
    cpu_seconds,
    machine,
    number_text,
    peak_memory,
    repeated,
    report,
    run_script,
    use_cores,
)
from naive import DictionaryChart, PairChart, PreparedSampler, ProductionSampler, best_parse, write_masked_samples, write_text
from nltk.grammar import Nonterminal
from nltk.parse import ViterbiParser

from pcfg.chart import MAX_WORDS, Chart
from pcfg.common.cli import run_main
from pcfg.common.files import keyed_rng
from pcfg.grammar import Grammar, find_rules
from pcfg.labels import Labeller
from pcfg.sampler import Sampler
from pretraining.data.vocabulary import Vocabulary
from tests.bert_tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
PRETRAINING, SAMPLES, DOWNSTREAM = (ROOT / f"generate_{name}.py" for name in ("pretraining", "samples", "downstream"))
LOOKUP = ("-m", "pcfg.lookup")
PER_CPU = "sentences/CPU-s"
SECONDS = 3.0  # that the engine is timed over, at --scale 1
MASKS = {"max_masks": 5, "masked_share": 0.15}
PAIRS = "with rules looked up by pairs"
MEMORY_GOAL = 2.0  # GiB


@dataclasses.dataclass
class Bench:
    """What the rows are measured on.

    Attributes:
        rules: the grammar's file.
        scale: of amounts and times.
        cores: processes that text shards are made with.
        folder: for files; each row removes its own.
    """

    rules: Path
    scale: float
    cores: int
    folder: Path

    def __post_init__(self):
        self.grammar = Grammar.read(self.rules)
        self.sampler = Sampler(self.grammar, MAX_WORDS)

    def amount(self, number: int) -> int:
        return max(2, round(number * self.scale))

    def draw(self, number: int, purpose: str):
        """tokens and lengths of `amount(number)` sentences."""
        return self.sampler.sample(self.amount(number), keyed_rng(0, f"benchmark-{purpose}"))

    def some_sentences(self, number: int) -> list[list[str]]:
        """`amount(number)` sentences whose lengths are the quantiles of many."""
        tokens, lengths = self.sampler.sample(10_000, keyed_rng(0, "benchmark-baseline"))
        number = self.amount(number)
        rows = np.argsort(lengths, kind="stable")[((np.arange(number) + 0.5) * len(lengths) / number).astype(int)]
        return [[self.grammar.words[word] for word in tokens[row, : lengths[row]]] for row in rows]

    def engine(self, work, sentences: int) -> float:
        """Sentences per CPU-second of work(), which does `sentences` of them."""
        return repeated(work, sentences, SECONDS * self.scale)

    def temporary(self):
        return tempfile.TemporaryDirectory(dir=self.folder)

    def pretraining(self, folder, shards: int, sentences: int) -> list:
        """The command line that makes training shards only."""
        sizes = ["--shard-num", shards, "--sentence-num", sentences, "--test-shard-num", 0]
        rules = ["--rule-path", self.rules, "--save-path", folder]
        return [PRETRAINING, *rules, *sizes, "--n_processes", self.cores]

    def samples(self, text, folder) -> list:
        masks = ["--max_predictions_per_seq", MASKS["max_masks"], "--masked_lm_prob", MASKS["masked_share"]]
        files = ["--dir", text, "-o", folder, "--vocab_file", "vocab.txt", "--max_seq_length", self.tokens]
        return [SAMPLES, *files, *masks, "--n_processes", self.cores]

    def downstream(self, folder, rows: int) -> list:
        sizes = ["--sentence-num", rows, "--validation-num", max(1, rows // 10), "--task-type", "A", "--min-words", 1]
        return [DOWNSTREAM, "--rule-path", self.rules, "--save-path", folder, *sizes]

    def lookup(self, text, table, *flags) -> list:
        return [*LOOKUP, "--rule-path", self.rules, "--datafile", text, "--save-path", table, *flags]

    @property
    def tokens(self) -> int:
        """Of a masked sample: 32, or what the longest sentence needs."""
        return max(32, self.sampler.width + 2)


def _baseline_rate(work, sentences: list) -> float:
    """Calls of work(sentence) per CPU-second."""
    start = cpu_seconds()
    for sentence in sentences:
        work(sentence)
    return len(sentences) / (cpu_seconds() - start)


def _write_baseline_shard(kind: type, rules: Path, path: str, sentences: int, seed: int) -> float:
    """Sentences per second of the clock of one process of a naive sampler; its start is not counted."""
    sampler = kind(Grammar.read(rules).to_nltk())
    random.seed(seed)
    start = time.perf_counter()
    write_text(sampler, path, sentences, max_words=31)
    return sentences / (time.perf_counter() - start)


def text_rows(bench: Bench) -> list[Row]:
    shards, sentences, naive_sentences = 20, bench.amount(1_000_000), bench.amount(20_000)
    with bench.temporary() as folder:
        # The kernels are compiled once per machine, so they are not part of the time.
        run_script(*bench.pretraining(f"{folder}/first", 1, 1))
        start = time.perf_counter()
        run_script(*bench.pretraining(f"{folder}/text", shards, sentences))
        rate = shards * sentences / (time.perf_counter() - start)
        with multiprocessing.get_context("spawn").Pool(bench.cores) as pool:
            jobs = [(bench.rules, f"{folder}/naive{core}.txt", naive_sentences, core) for core in range(bench.cores)]
            first, prepared = (
                sum(pool.starmap(partial(_write_baseline_shard, kind), jobs, chunksize=1))
                for kind in (ProductionSampler, PreparedSampler)
            )
    note = (
        f"{shards} shards of {sentences:,} sentences by generate_pretraining.py, from its start to its end; baseline: "
        f"{bench.cores} processes that write {naive_sentences:,} sentences each, their start not counted; "
        f"{_second_thought('with productions looked up once', rate, prepared)}"
    )
    what = "text shards to disk, end to end"
    return [Row(what, rate, f"sentences/s on {bench.cores} cores", first, 2_000_000, 500, note)]


def _second_thought(how: str, rate: float, improved: float) -> str:
    return f"{how} it makes {number_text(improved)}, a ratio of {number_text(rate / improved)}"


def label_rows(bench: Bench) -> list[Row]:
    charts = [kind(bench.grammar.to_nltk()) for kind in (DictionaryChart, PairChart)]
    tokens, lengths = bench.draw(100_000, "labels")
    rows = []
    for task, number, goal, goal_ratio in (("A", 60, 100_000, 5000), ("B", 1000, 300_000, None), ("C", 10_000, 300_000, None)):
        labeller = Labeller(bench.grammar, task)
        span, symbols = labeller.span, [Nonterminal(name) for name in labeller.names]
        rate = bench.engine(partial(labeller.label, tokens, lengths), len(lengths))
        sentences = [words[:span] for words in bench.some_sentences(number)]
        textbook, pairs = (_baseline_rate(partial(chart.label, symbols=symbols), sentences) for chart in charts)
        note = f"baseline on {len(sentences):,} sentences; {_second_thought(PAIRS, rate, pairs)}"
        if span:
            note += (
                f"; both fill the chart of the first {span} words alone; to a baseline that fills the whole chart, as task "
                f"A's does, the ratio is {number_text(rate / rows[0].baseline)}"
            )
        what = f"labels, task {task} ({f'first {span} words' if span else 'whole sentence'})"
        rows.append(Row(what, rate, PER_CPU, textbook, goal, goal_ratio, note))
    return rows


def _substitution_rate(chart: DictionaryChart, sentences: list[list[str]]) -> float:
    """Sentences per CPU-second of naive conditionals.

    A sentence of T words takes T V charts (V words); one of them, at random, is timed in each sentence and counts for all.
    """
    rng, seconds = keyed_rng(0, "benchmark-substitution"), 0.0
    for words in sentences:
        changed = list(words)
        changed[rng.integers(len(words))] = chart.words[rng.integers(len(chart.words))]
        start = cpu_seconds()
        chart.probability(changed)
        seconds += (cpu_seconds() - start) * len(words) * len(chart.words)
    return len(sentences) / seconds


def _conditionals_row(what: str, goal: float, rate: float, rates: tuple[float, float], sentences: int) -> Row:
    textbook, pairs = rates
    note = (
        "the baseline fills a chart for each word at each position; one of these, drawn at random, was timed in each of "
        f"{sentences:,} sentences; {_second_thought(PAIRS, rate, pairs)}"
    )
    return Row(what, rate, PER_CPU, textbook, goal, note=note)


def _substitution_rates(bench: Bench, number: int) -> tuple[tuple[float, float], int]:
    grammar, sentences = bench.grammar.to_nltk(), bench.some_sentences(number)
    return tuple(_substitution_rate(kind(grammar), sentences) for kind in (DictionaryChart, PairChart)), len(sentences)


def conditional_rows(bench: Bench) -> list[Row]:
    chart = Chart(bench.grammar, threads=1)
    arrays = bench.draw(10_000, "conditionals")
    baseline = _substitution_rates(bench, 150)
    full = bench.engine(partial(chart.conditionals, *arrays), len(arrays[1]))
    reduced = bench.engine(partial(chart.reductions, *arrays), len(arrays[1]))
    return [
        _conditionals_row("masked conditionals, full distributions", 50_000, full, *baseline),
        _conditionals_row("conditionals reduced to entropy and log P", 60_000, reduced, *baseline),
    ]


def deeper_rows(bench: Bench) -> list[Row]:
    deeper = dataclasses.replace(bench, rules=find_rules("rule_deeper_mlm.txt").resolve())
    arrays = deeper.draw(5000, "conditionals")
    rate = deeper.engine(partial(Chart(deeper.grammar, threads=1).conditionals, *arrays), len(arrays[1]))
    what = "conditionals, 32-word grammar (rule_deeper_mlm.txt)"
    return [_conditionals_row(what, 5000, rate, *_substitution_rates(deeper, 20))]


def sample_rows(bench: Bench) -> list[Row]:
    shards, sentences, naive_sentences = 4, bench.amount(1_000_000), bench.amount(30_000)
    with bench.temporary() as folder:
        run_script(*bench.pretraining(f"{folder}/text", shards, sentences))
        start = cpu_seconds()
        run_script(*bench.samples(f"{folder}/text", f"{folder}/samples"))
        rate = shards * sentences / (cpu_seconds() - start)
        tokenizer = build_tokenizer(Vocabulary.read(f"{folder}/text/vocab.txt"), True, bench.tokens)
        random.seed(0)
        start = cpu_seconds()
        text, samples = f"{folder}/text/training0.txt", f"{folder}/naive.hdf5"
        write_masked_samples(text, tokenizer, samples, bench.tokens, **MASKS, sentences=naive_sentences)
        baseline = min(naive_sentences, sentences) / (cpu_seconds() - start)
    note = (
        f"{shards} shards of {sentences:,} sentences by generate_samples.py, its start counted; baseline on "
        f"{min(naive_sentences, sentences):,} sentences, its start not counted"
    )
    return [Row("masked HDF5 samples, end to end", rate, PER_CPU, baseline, 100_000, 15, note)]


def parse_rows(bench: Bench) -> list[Row]:
    arrays, sentences = bench.draw(5000, "parses"), bench.some_sentences(16)
    baseline = _baseline_rate(partial(best_parse, ViterbiParser(bench.grammar.to_nltk())), sentences)
    rate = bench.engine(partial(Chart(bench.grammar, threads=1).parses, *arrays), len(arrays[1]))
    note = f"baseline: nltk's ViterbiParser on {len(sentences)} sentences"
    return [Row("most probable parses, as nltk trees", rate, PER_CPU, baseline, note=note)]


def startup_rows(bench: Bench) -> list[Row]:
    """Seconds of the clock for next to no work: the median of three runs after one that fills the caches."""
    runs = bench.amount(3)
    rows = []
    with bench.temporary() as folder:
        run_script(*bench.pretraining(f"{folder}/text", 1, 10))
        text = f"{folder}/text/training0.txt"
        commands = {
            "generate_pretraining.py": lambda place: bench.pretraining(place, 1, 1),
            "generate_samples.py": lambda place: bench.samples(f"{folder}/text", place),
            "generate_downstream.py": lambda place: bench.downstream(place, 10),
            "python -m pcfg.lookup": lambda place: bench.lookup(text, f"{place}.hdf5"),
        }
        for name, command in commands.items():
            seconds = []
            for run in range(1 + runs):
                start = time.perf_counter()
                run_script(*command(f"{folder}/{name}{run}"))
                seconds.append(time.perf_counter() - start)
            rows.append(Row(f"start of {name}", float(np.median(seconds[1:])), "s", goal=2, smaller_is_better=True))
    return rows


def memory_rows(bench: Bench) -> list[Row]:
    shards, sentences = 20, bench.amount(1_000_000)
    rows = []

    def measure(what: str, command: list) -> None:
        rows.append(Row(f"peak memory, {what}", peak_memory(*command), "GiB", goal=MEMORY_GOAL, smaller_is_better=True))

    with bench.temporary() as folder:
        text, every = Path(folder) / "text", f"{shards} x {sentences:,} sentences"
        measure(f"generate_pretraining.py, {every}", bench.pretraining(text, shards, sentences))
        measure(f"generate_samples.py, {every}", bench.samples(text, f"{folder}/samples"))
        shutil.rmtree(f"{folder}/samples")
        measure(f"generate_downstream.py, {sentences:,} rows", bench.downstream(f"{folder}/downstream", sentences))
        table = f"{folder}/lookup.hdf5"
        measure(f"python -m pcfg.lookup, {sentences:,} sentences", bench.lookup(text / "training0.txt", table))
        Path(table).unlink()
        whole = f"{folder}/all.txt"
        with open(whole, "wb") as joined:
            for shard in range(shards):
                with open(text / f"training{shard}.txt", "rb") as file:
                    shutil.copyfileobj(file, joined)
                joined.write(b"\n")
        measure(f"python -m pcfg.lookup --entropy-only, {every}", bench.lookup(whole, table, "--entropy-only"))
    return rows


ROWS = {
    "text": text_rows,
    "labels": label_rows,
    "conditionals": conditional_rows,
    "samples": sample_rows,
    "deeper": deeper_rows,
    "parses": parse_rows,
    "startup": startup_rows,
    "memory": memory_rows,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark.sh pcfg", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(ROWS))
    parser.add_argument(
        "--rule-path", default="rule_deep_mlm.txt", help="rules file, or a shipped grammar; default rule_deep_mlm.txt"
    )
    parser.add_argument("--memory", action="store_true", help="measure the generators' memory too; default: not")
    parser.add_argument("--folder", type=Path, help="for text and samples, some GB, removed in the end; default: the system's")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    names = options.only or [name for name in ROWS if name != "memory"]
    if options.memory and "memory" not in names:
        names.append("memory")
    rules = find_rules(options.rule_path).resolve()
    facts = machine("numpy", "numba", "h5py", "nltk", "transformers")
    rows = []
    if options.folder is not None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(rules, options.scale, options.cores, Path(folder))
        for name in names:
            print(f"measuring: {name}", flush=True)
            rows += ROWS[name](bench)
    report(rows, f"{rules.name} (sha256 {bench.grammar.sha256[:12]}); {facts}", options.output)


if __name__ == "__main__":
    run_main(main)
