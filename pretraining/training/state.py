"""Training states: what a run needs to go on after an interruption as if nothing had happened.

    training_state/latest                the tag of the newest state, written last
    training_state/<tag>/state.json      progress, arguments, SHA-256 of the files beside it
    training_state/<tag>/*.pt            DeepSpeed's checkpoint

A state appears complete or not at all, under a tag of its own: the newest one stays valid while the next is written.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path

from pcfg.artefacts import InputError, atomic_folder, atomic_open, read_json, sha256, write_json

STATE_FILE, LATEST_FILE = "state.json", "latest"
KEYS = ("progress", "arguments", "model", "vocabulary_sha256", "precision", "zero_stage", "world_size", "files")


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: finished steps.
        epoch: finished epochs.
        batch: finished global batches of the epoch that is under way.
        samples: sentences seen.
        tokens: tokens seen, [CLS] and [SEP] included.
        hours: of training.
        time_markers: how many of `--finetune_time_markers` are behind.
        lowest_scale_steps: how many steps the loss scale has been the lowest (float16).
        validation_loss: the newest, in nats.
        validated_step: when it was measured.
        stopped: why the run was stopped before its end.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    tokens: int = 0
    hours: float = 0.0
    time_markers: int = 0
    lowest_scale_steps: int = 0
    validation_loss: float | None = None
    validated_step: int | None = None
    stopped: str | None = None


def latest(root: Path) -> Path | None:
    """The newest state under `root`, or None.

    Raises:
        InputError: `latest` names a state that is not there.
    """
    path = root / LATEST_FILE
    if not path.is_file():
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    if not (root / tag / STATE_FILE).is_file():
        raise InputError(f"{path}: names {tag!r}, which has no {STATE_FILE}; {_another(root / tag)}")
    return root / tag


def _another(folder: Path) -> str:
    """What a user can do about the broken state `folder`."""
    others = ", ".join(path.name for path in _states(folder.parent) if path != folder)
    if not others:
        return f"no other state is there: delete {folder.parent} and begin anew"
    return f"delete {folder} and write the tag of another state ({others}) into {folder.parent / LATEST_FILE}"


def describe(folder: Path) -> dict:
    """The `state.json` of a state, with all keys that a run needs; the files beside it are not looked at.

    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / STATE_FILE
    state = read_json(path)
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise InputError(f"{path}: {missing[0]!r} is missing, not a whole training state; {_another(folder)}")
    return state


def find(root: Path, identifier: str | None) -> Path:
    """The state `identifier` under `root`, the newest if None.

    Raises:
        InputError: there is no such state; says which there are.
    """
    folder = root / identifier if identifier else latest(root)
    if folder is None or not (folder / STATE_FILE).is_file():
        known = ", ".join(path.name for path in _states(root)) or "none"
        what = f"has no state {identifier!r}" if identifier else "has no training state"
        raise InputError(f"--load_training_checkpoint: {root} {what}; there are: {known}")
    return folder


def read(folder: Path) -> dict:
    """The verified `state.json` of a state.

    Raises:
        InputError: a file of the state is missing, damaged or not one that was saved with it.
    """
    state = describe(folder)
    found = {path.name for path in folder.iterdir()} - {STATE_FILE}
    for name in sorted(found ^ state["files"].keys()):
        what = "isn't part of this training state; remove it" if name in found else "is missing; take another state"
        raise InputError(f"{folder / name}: {what}")
    for name, expected in state["files"].items():
        if sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: damaged, its SHA-256 is not the one saved; {_another(folder)}")
    return state


def save(engine, root: Path, ranks, facts: dict, keep: int) -> None:
    """Write a training state under a new tag, switch `latest` to it, then delete all but the newest `keep`.

    Args:
        engine: DeepSpeed's; every rank calls this with its own.
        ranks: `pretraining.training.distributed.Ranks`.
        facts: what `state.json` says, beside the files' hashes; has "progress".
    """
    tag = f"step{facts['progress']['step']:07d}"
    attempt = 1
    while (root / tag).exists():  # from before the run was taken back to an earlier state
        attempt += 1
        tag = f"step{facts['progress']['step']:07d}-{attempt}"
    tag = ranks.agree_on_name(tag)
    with atomic_folder(root / tag) if ranks.is_main else contextlib.nullcontext() as temporary:
        place = Path(ranks.agree_on_name(str(temporary)))
        engine.save_checkpoint(str(place.parent), tag=place.name, save_latest=False)
        ranks.wait()
        if ranks.is_main:
            files = {path.name: sha256(path) for path in sorted(place.iterdir())}
            write_json(place / STATE_FILE, {**facts, "files": files})
    if ranks.is_main:
        with atomic_open(root / LATEST_FILE) as file:
            file.write(tag)
        _prune(root, root / tag, keep)
    ranks.wait()


def load(engine, folder: Path) -> None:
    """Put the weights and the optimizer's state of a state that `read` has verified into `engine`."""
    engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)


def _states(root: Path) -> list[Path]:
    """All complete states under `root`, oldest first."""
    return sorted((path.parent for path in root.glob(f"*/{STATE_FILE}")), key=lambda path: path.stat().st_mtime_ns)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete what is under `root` but `newest` and the `keep` - 1 states before it."""
    older = [path for path in _states(root) if path != newest]
    kept = {newest, *older[max(0, len(older) - keep + 1) :]}
    for path in root.glob("step*"):
        if path.is_dir() and path not in kept:
            shutil.rmtree(path)
