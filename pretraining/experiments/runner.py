"""Runs a plan: several commands at a time, each as soon as its dependencies are done; what is done already is skipped.

A command is done when the files that it makes exist: every script writes them completely or not at all, so no other state is
needed, and no log is read. A failure is recorded in `status.json` and blocks the commands that need it; the rest continues.
"""

import contextlib
import ctypes
import datetime
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pcfg.common.files import disk_errors
from pretraining.experiments.plan import Step
from pretraining.experiments.resolve import ROOT
from pretraining.experiments.study import Status, read_decision, read_statuses, write_statuses
from pretraining.model.checkpoints import is_model_folder

LOCK_FILE = ".running"
# Exit codes of a command, or the negative number of the signal that has ended it.
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
POLL = 0.05  # seconds between two looks at the running commands
DEATH_SIGNAL = 1  # of Linux' prctl: the option that sets the signal of a process whose parent has ended


def is_done(step: Step, out: Path) -> bool:
    """Whether everything that the command makes exists; never for one that makes nothing."""
    if not all((out / path).exists() for path in step.makes):
        return False
    models = [(out / folder, file) for folder, file in step.records if is_model_folder(out / folder)]
    if step.records and not models:
        return False
    return bool(step.makes or step.records) and all(any(folder.glob(file)) for folder, file in models)


def _die_with_parent() -> None:
    """In a child, before it becomes the command: ask for SIGTERM when the runner is killed. Only Linux has this."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[int]:
    """Hold the folder: a second runner waits for the first one, and for the last commands of one that was killed.

    The commands inherit the open file, and the lock lasts until the last of them has ended.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: in use by another run, or by the last commands of one; waiting for them", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Runs the steps of a plan, each after those that it depends on, in the folder `out`, `jobs` commands at a time.

    `environment` is theirs in addition to this process's; `descriptor` is of the lock, which they inherit.
    """

    def __init__(self, steps: list[Step], out: Path, jobs: int, environment: dict[str, str], descriptor: int):
        self.steps = steps
        self.out = out
        self.jobs = jobs
        self.descriptor = descriptor
        self.environment = {**os.environ, **environment}
        self.statuses: dict[str, Status] = {}  # how each command ended
        own = {step.name for step in steps}
        self._of_others = {name: status for name, status in read_statuses(out).items() if name not in own}
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}
        self._begun = time.monotonic()

    def run(self) -> bool:
        """Run all that can run; returns whether nothing failed. An exception (Ctrl-C, SIGTERM) ends the commands first."""
        try:
            while self._start_ready_steps() or self._running:
                time.sleep(POLL)
                self._record_ended_steps()
        finally:
            self._end_commands()
        return all(status.state in ("done", "not due") for status in self.statuses.values())

    def _start_ready_steps(self) -> bool:
        """Start commands until all places are taken; returns whether any step is still waiting."""
        waiting = False
        for step in self.steps:
            if len(self._running) == self.jobs:  # no free place, so no need to look at the disk
                return True
            if step.name in self.statuses or step.name in self._running:
                continue
            is_ready = self.statuses.keys() >= {*step.needs, *step.after}
            if is_ready and self._settle(step):
                continue
            waiting = True
            if is_ready:
                self._start(step)
        return waiting

    def _settle(self, step: Step) -> bool:
        """Record the state of a step that will not be started; returns whether that is so."""
        states = {name: self.statuses[name].state for name in (*step.needs, *step.after)}
        missing = [name for name in step.needs if states[name] != "done"]
        has_models = any(is_model_folder(self.out / folder) for folder, _ in step.records)
        # A run of several seeds that fails for one of them has saved the models of the others.
        if step.after and not has_models and all(states[name] != "done" for name in step.after):
            missing += step.after
        if missing:
            # A step that waits for one that is not due is not due either.
            is_due = any(states[name] != "not due" for name in missing)
            why = f"{missing[0]}: {states[missing[0]]}"
            self._note(step, Status(state="blocked" if is_due else "not due", why=why))
        elif undecided := [name for name in step.choices if self._value(name) is None]:
            self._note(step, Status(state="not due", why=f"choice {undecided[0]} admits none of its values"))
        elif is_done(step, self.out):
            self._note(step, Status(state="done"), skipped=True)
        else:
            return False
        return True

    def _log(self, step: Step) -> Path:
        return Path("logs") / (re.sub(r"[^\w.]+", "_", step.name) + ".log")

    def _value(self, choice: str) -> float | None:
        """The value that a choice has decided on, or None."""
        decision = read_decision(self.out, choice)
        return decision.chosen if decision else None

    def _start(self, step: Step) -> None:
        words = [word.replace("$OUT", str(self.out)) for word in step.words]
        for name in step.choices:
            words = [word.replace(f"{{{name}}}", f"{self._value(name):g}") for word in words]
        if words[0] == "python":
            words[0] = sys.executable
        path = self.out / self._log(step)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "a") as log:
                log.write(f"$ OUT={self.out}; {step.command}\n")
                log.flush()
                process = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # this process passes Ctrl-C on
                    pass_fds=(self.descriptor,),
                    preexec_fn=_die_with_parent,
                )
        self._running[step.name] = process, time.monotonic()

    def _record_ended_steps(self) -> None:
        for step in [step for step in self.steps if step.name in self._running]:
            process, begun = self._running[step.name]
            if process.poll() is None:
                continue
            del self._running[step.name]
            seconds = round(time.monotonic() - begun, 1)
            log = self._log(step).as_posix()
            code = process.returncode
            if code == 0 and step.draft and (self.out / step.draft).exists():
                os.replace(self.out / step.draft, self.out / step.makes[0])
            if code == 0 and (not step.all_makes or is_done(step, self.out)):
                self._note(step, Status(state="done", seconds=seconds, log=log))
            else:
                why = "it did not make everything that it should" if code == 0 else None
                why = "interrupted; run the studies again to resume" if code in INTERRUPTED else why
                self._note(step, Status(state="failed", exit_code=code, why=why, seconds=seconds, log=log))

    def _note(self, step: Step, status: Status, skipped: bool = False) -> None:
        """Record how a step ended, on the disk and on the screen."""
        self.statuses[step.name] = status
        write_statuses(self.out, {**self._of_others, **self.statuses})
        text: str = "done already" if skipped else status.state
        if status.state == "failed":
            text += f" with exit code {status.exit_code}; see {self.out}/{status.log}"
        if status.why:
            text += f" ({status.why})"
        elif status.state == "done" and status.seconds is not None:
            text += f" in {status.seconds:.0f} s"
        elapsed = time.monotonic() - self._begun
        rate = 60 * sum(other.seconds is not None for other in self.statuses.values()) / max(elapsed, 1e-9)
        print(
            f"[{len(self.statuses):3}/{len(self.steps)}] {step.name}: {text}  "
            f"({datetime.timedelta(seconds=round(elapsed))} elapsed, {rate:.2g} commands per minute)",
            flush=True,
        )

    def _end_commands(self) -> None:
        """Ask the running commands to end, and wait for them: a pre-training saves its state first."""
        for process, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process, _ in self._running.values():
            process.wait()
