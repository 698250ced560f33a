"""What a run says of itself: records, losses that are not finite, and signals."""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pcfg.common.files import AnyPath, InputError, atomic_open, disk_errors

METRICS_FILE = "metrics.jsonl"
DIVERGED = "try a smaller --lr, a longer warmup or --gradient_clipping 1.0; the last training state and model folder are kept"


def read_metrics(path: AnyPath) -> list[dict]:
    """The records of a metrics file; an unfinished last line, left by a kill, is ignored."""
    lines = Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise InputError(f"{path}:{number}: not a JSON record ({error}); remove the line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise InputError(f"{path}:{number}: not a record with its step; remove the line")
        records.append(record)
    return records


class Metrics:
    """Appends records to `metrics.jsonl` in a folder, one JSON line per record, and to Weights & Biases if asked for.

    The run starts from `step`: records of later steps, from before an interruption, are removed. Records of a branch have the
    number of steps in all as "step", and the trunk's step as "branch". They are of no other run than the branch: it removes
    them itself, and Weights & Biases, whose steps only go up, never gets them.
    """

    def __init__(self, folder: Path, step: int, options: argparse.Namespace):
        self.path = folder / METRICS_FILE
        self._open(lambda record: "branch" in record or record["step"] <= step and step > 0)
        self._run = start_wandb(folder, options) if options.project_name and options.report_to == "wandb" else None

    def _open(self, keeps: Callable[[dict], bool]) -> None:
        """Open the file for appending, with the records that are to be kept."""
        earlier = [record for record in read_metrics(self.path) if keeps(record)]
        with atomic_open(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in earlier)
        self._file = open(self.path, "ab", buffering=0)

    def begin_branch(self, branch: int, step: int) -> None:
        """Remove the records of a branch that are later than `step`, the number of steps in all at which it begins."""
        self._file.close()
        self._open(lambda record: record.get("branch") != branch or branch < record["step"] <= step)

    def write(self, record: dict) -> None:
        """Append a record (it has "step"); the operating system has it when this returns."""
        line = (json.dumps(record) + "\n").encode()
        with disk_errors(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._run is not None and "branch" not in record:
            self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def sync(self) -> None:
        """Return when all records are on the disk: a power cut must not leave a training state without its records."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._run is not None:
            self._run.finish()


def start_wandb(folder: Path, options: argparse.Namespace) -> Any:
    """A run of Weights & Biases in the project `--project_name`; offline unless WANDB_MODE says otherwise."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise InputError("--project_name: the package wandb is not installed; pip install wandb, or --report_to none") from None
    return wandb.init(
        project=options.project_name,
        name=folder.name,
        # The same folder is the same run, so that a resumed run continues the same curve.
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow" if os.environ["WANDB_MODE"] == "online" else None,
        dir=str(folder),
        config=vars(options),
    )


class LossWatch:
    """Checks that the losses of every step are finite, without making the host wait for the device.

    On a GPU a step's losses are copied behind it, and read when the next step is queued; on a CPU they are read at once.
    """

    def __init__(self, device: torch.device, names: Sequence[str], diverged: dict[str, str]):
        """`diverged` gets the reason by name of each member that is left out; the names begin the messages."""
        self._names = names
        self._diverged = diverged
        self._is_cuda = device.type == "cuda"
        self._unseen: list[tuple[str, dict[str, torch.Tensor], torch.cuda.Event | None]] = []

    def add(self, where: str, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses (members,) of a step, the same on all ranks, so that all of them stop; checks those that are due.

        `where` is the step and the batch, for the message.
        """
        copies = {name: loss.to("cpu", non_blocking=True) for name, loss in losses.items()}  # into pinned memory
        copied = torch.cuda.Event() if self._is_cuda else None
        if copied is not None:
            copied.record()
        self._unseen.append((where, copies, copied))
        self.settle(1 if self._is_cuda else 0)

    def settle(self, unseen: int = 0) -> None:
        """Check all steps but the last `unseen`."""
        while len(self._unseen) > unseen:
            where, losses, copied = self._unseen.pop(0)
            if copied is not None:
                copied.synchronize()
            for name, loss in losses.items():
                for index, value in enumerate(loss.tolist()):
                    if not math.isfinite(value):
                        self.leave_out(index, f"{where}: the {name.replace('_', ' ')} is {value}")

    def leave_out(self, index: int, reason: str) -> None:
        """Leave a member out from here on: the others go on without it. The last one ends the run by an `InputError`."""
        name = self._names[index]
        if name in self._diverged:
            return
        if len(self._diverged) == len(self._names) - 1:
            raise InputError(f"{name}{': ' if name else ''}{reason}; {DIVERGED}")
        self._diverged[name] = reason
        print(f"warning: {name}: {reason}; it is left out from here on, the others go on", flush=True)

    def living(self) -> list[int]:
        """The members that have not diverged."""
        return [index for index, name in enumerate(self._names) if name not in self._diverged]


def diverged_error(diverged: dict[str, str]) -> InputError:
    """What the end of a run says of the members that were left out."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in diverged.items())
    return InputError(f"{reasons}. The other seeds are complete; for these, try a smaller --lr, a longer warmup or other seeds")


class Signals:
    """Within its block, SIGTERM and Ctrl-C are only noted, so that a step can finish; a second Ctrl-C acts as usual.

    Launchers pass on a signal that the whole group of processes got as well: a repeated SIGTERM is the same request, and so is
    a SIGINT within `SAME` seconds.
    """

    SAME = 1.0

    def __init__(self):
        self.received: signal.Signals | None = None
        self._interrupted = math.inf  # when the first SIGINT came
        self._usual: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal.signal asks for it)
        now = time.monotonic()
        if number == signal.SIGINT and now > self._interrupted + self.SAME:
            self._restore()
            signal.raise_signal(number)
            return
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # not the main thread (a notebook's worker): signals stay as they are
            for number in (signal.SIGTERM, signal.SIGINT):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()
