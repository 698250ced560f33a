"""Training states: everything that a run needs to resume after an interruption as if nothing had happened.

    training_state/latest                the tag of the newest state, written last
    training_state/<tag>/state.json      progress, facts of the run, SHA-256 of the other files and of itself
    training_state/<tag>/*.pt            the learner's files: DeepSpeed's checkpoint

A state appears complete or not at all, under a tag of its own: the newest one stays valid while the next is written. A damaged
state is never loaded.
"""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pcfg.common.files import (
    FILES,
    InputError,
    atomic_folder,
    atomic_open,
    check_file,
    disk_errors,
    read_sealed,
    sha256,
    write_sealed,
)
from pcfg.common.ranks import Ranks
from pcfg.common.schema import Schema, parse_schema
from pretraining.training.learner import Learner

STATE_FILE = "state.json"
LATEST_FILE = "latest"
TAG = re.compile(r"step\d{7,}(-\d+)?")
DAMAGED = ".damaged"  # appended to the name of a damaged state, until the next one is saved
# All classes that DeepSpeed puts into a checkpoint of ZeRO 0, 1 or 2, next to tensors and plain types. They hold numbers only.
SAFE_CLASSES = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class Progress(Schema, frozen=False):
    """How far a run is."""

    step: int = 0  # finished steps
    epoch: int = 0  # finished epochs
    batch: int = 0  # finished global batches of the current epoch
    samples: int = 0  # sentences seen by each member
    tokens: int = 0  # tokens seen by all members, [CLS] and [SEP] included
    hours: float = 0.0  # of training
    time_markers: int = 0  # how many of --finetune_time_markers have passed
    lowest_scale_steps: int = 0  # for how many steps the loss scale has been the lowest (float16)
    validation_loss: float | None = None  # the newest, in nats, the mean over members
    validated_step: int | None = None  # when it was measured
    gap_step: int | None = None  # when the gap was measured last
    is_below_target: bool = False  # whether it was below --target_gap then
    stopped: str | None = None  # why the run was stopped before its end
    diverged: dict[str, str] = {}  # with several members, the reason why one of them was left out, by "seed S"


class Stacking(Schema):
    """How the members of a run of several seeds were trained: in float32 on one rank, without DeepSpeed's engine."""

    seeds: tuple[int, ...]
    vmap: bool  # whether each operation was done for all members at once; else they took turns within each step


class RunFacts(Schema, extra="ignore"):
    """The facts of a run in `args.json` and `state.json`."""

    job_name: str
    seed: int
    vocabulary_sha256: str
    git_revision: str | None
    versions: dict[str, str]
    arguments: dict[str, Any]  # of the command line
    model: dict[str, Any]  # fields of its ModelConfig
    parameters: int | None = None  # their number; states of earlier versions have another name for it
    world_size: int
    threads: int | None = None  # of torch, in each rank; rounding depends on it
    precision: str
    device: str | None = None  # cpu, or the name of the GPU of the main rank; states of earlier versions lack it
    attention: str | None = None  # the kernels that compute it
    zero_stage: int
    adversarial: dict[str, str] | None = None  # name and SHA-256 of the labelled file of the term
    # SHA-256 of the weights that training began with, if they were not new; with several members by seed
    initial_weights: dict[str, str] | None = None
    stacked: Stacking | None = None  # with --seeds


class SavedState(RunFacts):
    """The content of a `state.json`."""

    progress: dict[str, Any]  # not a Progress: a state of another version must be refused, not passed over as damaged
    files: dict[str, str]  # SHA-256 by name


class State(Schema):
    """An intact state."""

    folder: Path
    saved: SavedState
    damaged: list[Path] = []  # states that would have come before it

    def progress(self) -> Progress:
        """How far the run was."""
        advice = "another version wrote it; resume with that version"
        return parse_schema(Progress, self.saved.progress, self.folder / STATE_FILE, advice)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of checkpoint files, which by itself loads with `weights_only=False`."""

    def __init__(self, expected: dict[str, str] | None = None):
        super().__init__()
        self.expected = expected or {}  # SHA-256 of the files that may be loaded, by name

    def save(self, state_dict: dict, path: str) -> None:
        """Write `state_dict`. A full disk is an OSError here; where torch opens the file itself, it is a RuntimeError."""
        with open(path, "wb") as file:
            torch.save(state_dict, file)

    def load(self, path: str, map_location: Any = None) -> dict:
        """The content of a file with the expected hash, of tensors, plain types and `SAFE_CLASSES`; nothing is executed."""
        # One descriptor for both: what is loaded is what was hashed, even if the name has come to mean another file.
        with open(path, "rb") as file:
            check_file(Path(path), Path(path).parent / STATE_FILE, {FILES: self.expected}, digest=sha256(file))
            file.seek(0)
            try:
                with torch.serialization.safe_globals(list(SAFE_CLASSES)):
                    return torch.load(file, map_location=map_location, weights_only=True)
            except Exception as error:  # torch's reader raises many kinds for foreign bytes, with long texts
                raise InputError(
                    f"{path}: refused ({type(error).__name__}), it holds more than tensors, numbers and DeepSpeed's loss "
                    "scale; it isn't a checkpoint of this project, delete the folder"
                ) from None


def latest(root: Path) -> Path | None:
    """The state that `latest` names under `root`; None if there is no such file."""
    path = root / LATEST_FILE
    if not path.is_file():
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    # A tag only: text from a file is no path.
    if not TAG.fullmatch(tag) or not (root / tag / STATE_FILE).is_file():
        raise InputError(f"{path}: names {tag[:40]!r}, which has no {STATE_FILE}")
    return root / tag


def read(folder: Path) -> SavedState:
    """The `state.json` of a state; all files of the state are verified."""
    path = folder / STATE_FILE
    content = read_sealed(path)
    saved = parse_schema(SavedState, content, path, "it is not a whole training state")
    for name in sorted({file.name for file in folder.iterdir()} | saved.files.keys()):
        if name != STATE_FILE:
            check_file(folder / name, path, content)
    return saved


def newest(root: Path, report: Callable[[str], object] = print) -> State | None:
    """The newest intact state under `root`; None without states. `report` gets a line for each damaged one passed over."""
    folders = _states(root)[::-1]
    problems: list[str] = []
    damaged: list[Path] = []
    try:
        named = latest(root)
        if named is not None:  # a newer state that is not named yet was being finished when the run was killed
            folders = [named, *(folder for folder in folders if folder != named)]
    except InputError as error:
        problems.append(str(error))
    for folder in folders:
        try:
            state = State(folder=folder, saved=read(folder), damaged=damaged)
        except (InputError, OSError) as error:  # OSError: a disk that can no longer be read
            problems.append(str(error))
            damaged.append(folder)
            continue
        for problem in problems:
            report(f"warning: {problem}; passed over, the newest whole training state is {folder.name}")
        return state
    if problems:
        raise InputError(
            f"{problems[0]}; no whole training state is left in {root}: --overwrite begins anew, or give another --job_name"
        )
    return None


def find(root: Path, identifier: str | None) -> State:
    """The state `identifier` under `root`; the newest intact one for None."""
    state = newest(root) if identifier is None else None
    if identifier is not None and (root / identifier / STATE_FILE).is_file():
        state = State(folder=root / identifier, saved=read(root / identifier))
    if state is None:
        known = ", ".join(path.name for path in _states(root)) or "none"
        what = f"has no state {identifier!r}" if identifier else "has no training state"
        raise InputError(f"--load_training_checkpoint: {root} {what}; there are: {known}")
    return state


def tidy(state: State, keep: int) -> None:
    """Bring the folder of `state`, the newest intact one there, to the condition in which `save` would have left it.

    Damaged states get another name: they no longer count, and can be inspected until the next state is saved.
    """
    for folder in state.damaged:
        target = folder.with_name(folder.name + DAMAGED)
        with disk_errors(target):
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
    _prune(state.folder.parent, state.folder, keep)


def save(learner: Learner, root: Path, ranks: Ranks, facts: RunFacts, progress: Progress, keep: int) -> Path:
    """Write a training state under a new tag, switch `latest` to it, then delete all but the newest `keep`.

    Every rank calls this with its own learner. Returns the state's folder.
    """
    step_tag = f"step{progress.step:07d}"
    tags = (step_tag if attempt == 1 else f"{step_tag}-{attempt}" for attempt in itertools.count(1))
    # One may exist from before the run went back to an earlier state.
    tag = ranks.of_main(next(tag for tag in tags if not (root / tag).exists()))
    with atomic_folder(root / tag) if ranks.is_main else disk_errors(root / tag) as temporary:
        folder = ranks.of_main(temporary)
        learner.save(folder)
        ranks.wait()
        if ranks.is_main:
            write_sealed(folder / STATE_FILE, {"progress": progress.model_dump(), **facts.model_dump(exclude_unset=True)})
    if ranks.is_main:
        with atomic_open(root / LATEST_FILE) as file:
            file.write(tag)
        _prune(root, root / tag, keep)
        for damaged in root.glob(f"step*{DAMAGED}"):
            shutil.rmtree(damaged)
    ranks.wait()
    return root / tag


def _states(root: Path) -> list[Path]:
    """All complete states under `root`, damaged or not, oldest first."""
    folders = (path.parent for path in root.glob(f"*/{STATE_FILE}") if TAG.fullmatch(path.parent.name))
    return sorted(folders, key=lambda folder: ((folder / STATE_FILE).stat().st_mtime_ns, folder.name))


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete the states under `root` except `newest` and the `keep` - 1 before it, and leftovers of kills."""
    older = [path for path in _states(root) if path != newest]
    for path in older[: max(0, len(older) - keep + 1)]:
        # A half-deleted state must not look like one.
        path.rename(path.with_name(f".{path.name}.tmp"))
    for path in root.glob(".step*.tmp"):
        shutil.rmtree(path)
