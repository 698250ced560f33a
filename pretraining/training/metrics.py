"""The record of a run: a line of JSON a record, always; Weights & Biases when asked for."""

import argparse
import errno
import hashlib
import json
import os
from pathlib import Path

from pcfg.common.files import InputError, atomic_open, disk_errors

METRICS_FILE = "metrics.jsonl"


def read_metrics(path) -> list[dict]:
    """The records of a metrics file. A last line without its end, left by a kill, is passed over.

    Raises:
        InputError: another line is no record (with its number).
    """
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
    """Appends records to `metrics.jsonl` in a folder.

    Args:
        folder: of the run.
        step: the step that the run starts from; records of later steps, from before an interruption, are taken out.
        options: of the command line.
    """

    def __init__(self, folder: Path, step: int, options: argparse.Namespace):
        self.path = folder / METRICS_FILE
        kept = [record for record in read_metrics(self.path) if record["step"] <= step and step > 0]
        with atomic_open(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self._file = open(self.path, "ab", buffering=0)
        self._run = start_wandb(folder, options) if options.project_name and options.report_to == "wandb" else None

    def write(self, record: dict) -> None:
        """Append a record (it has "step"); it is on its way to the disk when this returns.

        Raises:
            InputError: the disk is full.
        """
        line = (json.dumps(record) + "\n").encode()
        with disk_errors(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._run is not None:
            self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def sync(self) -> None:
        """Return when all records are on the disk: a training state must not survive a power cut that they don't."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._run is not None:
            self._run.finish()


def start_wandb(folder: Path, options: argparse.Namespace):
    """A run of Weights & Biases in the project `--project_name`; without a network or a login unless WANDB_MODE asks for them.

    Raises:
        InputError: the package is missing.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise InputError("--project_name: the package wandb is not installed; pip install wandb, or --report_to none") from None
    # The same folder is the same run, so that a run that was taken up again goes on in the same curve.
    identifier = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=options.project_name,
        name=folder.name,
        id=identifier,
        resume="allow" if os.environ["WANDB_MODE"] == "online" else None,
        dir=str(folder),
        config=vars(options),
    )
