"""What all benchmarks have in common: clocks, the table, the machine, the command line."""

import argparse
import contextlib
import dataclasses
import datetime
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pcfg.common.cli import positive_int
from pcfg.common.files import InputError, atomic_open, versions


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: the work.
        rate: of the engine: units of work a second, or (`smaller_is_better`) what it took.
        unit: of the three numbers.
        baseline: of the naive implementation, in the same run; None where there is none.
        goal: for `rate`; None where there is none.
        goal_ratio: for rate / baseline; None where there is none.
        note: how the baseline was measured, for the list below the table.
        smaller_is_better: for seconds and bytes.
    """

    what: str
    rate: float
    unit: str
    baseline: float | None = None
    goal: float | None = None
    goal_ratio: float | None = None
    note: str = ""
    smaller_is_better: bool = False

    def reached(self) -> bool | None:
        """Whether the goals are; None without any."""
        if self.goal is None and self.goal_ratio is None:
            return None
        if self.smaller_is_better:
            return self.rate <= self.goal
        return self.rate >= (self.goal or 0) and (self.goal_ratio is None or self.rate >= self.goal_ratio * self.baseline)

    def cells(self) -> list[str]:
        ratio_goal = None if self.goal_ratio is None else f"{self.goal_ratio:,}x"
        goal = ", ".join(text for text in (None if self.goal is None else number_text(self.goal), ratio_goal) if text)
        reached = {None: "", True: "yes", False: "no"}[self.reached()]
        baseline = "" if self.baseline is None else number_text(self.baseline)
        ratio = "" if self.baseline is None else f"{number_text(self.rate / self.baseline)}x"
        return [self.what, self.unit, number_text(self.rate), baseline, ratio, goal, reached]


HEADER = ["what", "unit", "rate", "baseline", "ratio", "goal", "reached"]


def number_text(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> number_text(1234567.0), number_text(19.87), number_text(0.01234), number_text(2)
    ('1,230,000', '19.9', '0.0123', '2')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:,.10g}"


def markdown(rows: list[Row]) -> str:
    """The table and, below it, its notes."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {row.what}: {row.note}\n" for row in rows if row.note)
    return table + (f"\n{notes}" if notes else "")


def machine(*packages: str) -> str:
    """What the numbers depend on: the processor, the cores in use, how busy they were, the day, versions."""
    named = ", ".join(f"{name} {version}" for name, version in versions(*packages).items())
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{_processor()}, {cores} cores used of {os.cpu_count()} (load before: {load:.1f}), {datetime.date.today()}; {named}"


def _processor() -> str:
    """The processor's name; what Python knows of it where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cpu_seconds() -> float:
    """Of all threads of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def repeated(work, amount: int, least_seconds: float) -> float:
    """`amount` times calls of work() a CPU-second, over as many calls as take `least_seconds`; one more call comes first.

    The first call loads the compiled kernels, or compiles them.
    """
    work()
    calls, start = 0, cpu_seconds()
    while calls == 0 or cpu_seconds() - start < least_seconds:
        work()
        calls += 1
    return calls * amount / (cpu_seconds() - start)


@contextlib.contextmanager
def _started(words):
    """A script or module of the project, started on this interpreter; the block's end waits for its end.

    Raises:
        InputError: it failed; with the end of what it printed.
    """
    command = [sys.executable, *map(str, words)]
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            yield process
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            printed.seek(0)
            raise InputError(f"{' '.join(command)}: exit code {process.returncode}\n{printed.read()[-3000:]}")


def run_script(*words) -> None:
    """Run a script or module of the project to its end; InputError if it fails."""
    with _started(words):
        pass


def peak_memory(*words) -> float:
    """Run a script as `run_script` does; returns GiB, the peaks of its process and of its children added up.

    The kernel keeps each process's peak (VmHWM), so a peak between two looks is not missed; processes that peak at
    different times make the sum an upper bound.
    """
    peaks: dict[int, int] = {}
    with _started(words) as process:
        while process.poll() is None:
            for pid in _descendants(process.pid):
                peaks[pid] = max(_peak_kib(pid), peaks.get(pid, 0))
            time.sleep(0.02)
    return sum(peaks.values()) / 2**20


def _descendants(pid: int) -> list[int]:
    """The process and its children's children; empty if it has ended."""
    found = []
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                found += _descendants(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *found]


def _peak_kib(pid: int) -> int:
    """VmHWM of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def add_arguments(parser: argparse.ArgumentParser, rows: list[str]) -> None:
    """The flags that all benchmarks have."""
    parser.add_argument("--only", nargs="+", choices=rows, metavar="ROW", help=f"rows to measure, of {', '.join(rows)}")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of all amounts of work and of the 3 s that each rate is measured over; below 1 the rates are rough; default 1",
    )
    parser.add_argument("--cores", type=positive_int, default=2, help="cores in use, of those of the machine; default 2")
    parser.add_argument("--output", type=Path, help="write the table here too, as Markdown; default: only print it")


def use_cores(wanted: int) -> None:
    """Keep this process and its children on `wanted` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:wanted])


def report(rows: list[Row], title: str, output: Path | None) -> None:
    """Print the table and write it to `output`."""
    text = f"{title}\n\n{markdown(rows)}"
    print(f"\n{text}", end="")
    if output:
        with atomic_open(output) as file:
            file.write(text)


def measure_settings(name: str, description: str, settings: dict, measure, arguments: list[str] | None) -> None:
    """The whole command of a benchmark of models: one row a setting.

    Args:
        name: of the benchmark, after `bash scripts/benchmark.sh`.
        settings: by the name of their row.
        measure: gives the `Row` of (setting, --scale, --cores).
    """
    import torch  # not of all benchmarks

    parser = argparse.ArgumentParser(
        prog=f"bash scripts/benchmark.sh {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(settings))
    options = parser.parse_args(arguments)
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    facts, rows = machine("numpy", "torch", "transformers"), []
    for row in options.only or settings:
        print(f"measuring: {row}", flush=True)
        rows.append(measure(settings[row], options.scale, options.cores))
    report(rows, facts, options.output)
