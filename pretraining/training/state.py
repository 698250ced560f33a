"""Training states: what a run needs to go on after an interruption as if nothing had happened.

    training_state/latest                the tag of the newest state, written last
    training_state/<tag>/state.json      progress, arguments, SHA-256 of the files beside it and of itself
    training_state/<tag>/*.pt            DeepSpeed's checkpoint

A state appears complete or not at all, under a tag of its own: the newest one stays valid while the next is written. One that
has been damaged since is never loaded.
"""

import dataclasses
import re
import shutil
from pathlib import Path

from pcfg.common.files import FILES, InputError, atomic_folder, atomic_open, check_file, disk_errors, read_sealed, write_sealed
from pretraining.training.safe_torch import SafeCheckpointEngine

STATE_FILE, LATEST_FILE = "state.json", "latest"
KEYS = ("progress", "arguments", "model", "vocabulary_sha256", "precision", "zero_stage", "world_size")
TAG = re.compile(r"step\d{7,}(-\d+)?")
DAMAGED = ".damaged"  # appended to the name of a state that was passed over, until the next one is saved


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


def progress_of(saved: dict, folder: Path) -> Progress:
    """The progress that the `state.json` of `folder` tells of.

    Raises:
        InputError: it has other entries than this version's; names one.
    """
    known = {field.name for field in dataclasses.fields(Progress)}
    foreign = saved["progress"].keys() - known if isinstance(saved["progress"], dict) else {"progress"}
    if foreign:
        raise InputError(f"{folder / STATE_FILE}: {min(foreign)!r} is unknown here; which version wrote it?")
    return Progress(**saved["progress"])


def latest(root: Path) -> Path | None:
    """The state that `latest` names under `root`; None if there is no such file.

    Raises:
        InputError: what it names is not there.
    """
    path = root / LATEST_FILE
    if not path.is_file():
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    # A tag only: text from a file is no path.
    if not TAG.fullmatch(tag) or not (root / tag / STATE_FILE).is_file():
        raise InputError(f"{path}: names {tag[:40]!r}, which has no {STATE_FILE}")
    return root / tag


def read(folder: Path) -> dict:
    """The `state.json` of a state, whose files have all been verified.

    Raises:
        InputError: a file of the state is missing, damaged or not one that was saved with it.
    """
    path = folder / STATE_FILE
    state = read_sealed(path)
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise InputError(f"{path}: {missing[0]!r} is missing, not a whole training state")
    for name in sorted({file.name for file in folder.iterdir()} | state[FILES].keys()):
        if name != STATE_FILE:
            check_file(folder / name, path, state)
    return state


@dataclasses.dataclass
class Found:
    """A whole state.

    Attributes:
        folder: of the state.
        saved: its `state.json`.
        damaged: states that would have come before it.
    """

    folder: Path
    saved: dict
    damaged: list[Path] = dataclasses.field(default_factory=list)


def newest(root: Path, report=print) -> Found | None:
    """The newest whole state under `root`; None if there are no states.

    Args:
        report: is given a line for each state that is passed over because it is damaged.

    Raises:
        InputError: there are states, but none is whole.
    """
    others, problems, damaged = _states(root)[::-1], [], []
    try:
        # A state that is there, but isn't named yet, was being finished when the run was killed.
        named = latest(root)
        others = [folder for folder in others if folder != named]
        others = others if named is None else [named, *others]
    except InputError as error:
        problems.append(str(error))
    for folder in others:
        try:
            found = Found(folder, read(folder), damaged)
        except (InputError, OSError) as error:  # OSError: a disk that can't be read any more
            problems.append(str(error))
            damaged.append(folder)
            continue
        for problem in problems:
            report(f"warning: {problem}; passed over, the newest whole training state is {folder.name}")
        return found
    if problems:
        raise InputError(
            f"{problems[0]}; no whole training state is left in {root}: --overwrite begins anew, or give another --job_name"
        )
    return None


def find(root: Path, identifier: str | None, report=print) -> Found:
    """The state `identifier` under `root`, the newest whole one if None.

    Raises:
        InputError: there is no such state (says which there are), or it is damaged.
    """
    found = newest(root, report) if identifier is None else None
    if identifier is not None and (root / identifier / STATE_FILE).is_file():
        found = Found(root / identifier, read(root / identifier))
    if found is None:
        known = ", ".join(path.name for path in _states(root)) or "none"
        what = f"has no state {identifier!r}" if identifier else "has no training state"
        raise InputError(f"--load_training_checkpoint: {root} {what}; there are: {known}")
    return found


def tidy(found: Found, keep: int) -> None:
    """Make the folder of `found`, the newest whole state there, what `save` would have left.

    Damaged states get another name: they no longer count, and can be looked at until the next state is saved.
    """
    for folder in found.damaged:
        target = folder.with_name(folder.name + DAMAGED)
        with disk_errors(target):
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
    _prune(found.folder.parent, found.folder, keep)


def save(engine, root: Path, ranks, facts: dict, keep: int) -> None:
    """Write a training state under a new tag, switch `latest` to it, then delete all but the newest `keep`.

    Args:
        engine: DeepSpeed's; every rank calls this with its own.
        ranks: `pcfg.common.ranks.Ranks`.
        facts: what `state.json` says, beside the files' hashes; has "progress".
    """
    tag = f"step{facts['progress']['step']:07d}"
    attempt = 1
    while (root / tag).exists():  # from before the run was taken back to an earlier state
        attempt += 1
        tag = f"step{facts['progress']['step']:07d}-{attempt}"
    tag = ranks.agree_on_text(tag)
    engine.checkpoint_engine = SafeCheckpointEngine()
    with atomic_folder(root / tag) if ranks.is_main else disk_errors(root / tag) as temporary:
        place = Path(ranks.agree_on_text(str(temporary)))
        engine.save_checkpoint(str(place.parent), tag=place.name, save_latest=False)
        ranks.wait()
        if ranks.is_main:
            write_sealed(place / STATE_FILE, facts)
    if ranks.is_main:
        with atomic_open(root / LATEST_FILE) as file:
            file.write(tag)
        _prune(root, root / tag, keep)
        for damaged in root.glob(f"step*{DAMAGED}"):
            shutil.rmtree(damaged)
    ranks.wait()


def load(engine, found: Found) -> None:
    """Put the weights and the optimizer's state of a verified state into `engine`; all ranks call this together.

    Raises:
        InputError: the files aren't those that were verified, hold anything but numbers, or belong to another model.
    """
    engine.checkpoint_engine = SafeCheckpointEngine(found.saved[FILES])
    folder = found.folder
    try:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
        raise InputError(
            f"{folder}: DeepSpeed can't load it ({reason}); it is from another version or another model"
        ) from error
    if loaded is None:
        raise InputError(f"{folder}: has no checkpoint of DeepSpeed; take another state")


def _states(root: Path) -> list[Path]:
    """All complete states under `root`, damaged or not, oldest first."""
    found = (path.parent for path in root.glob(f"*/{STATE_FILE}") if TAG.fullmatch(path.parent.name))
    return sorted(found, key=lambda folder: ((folder / STATE_FILE).stat().st_mtime_ns, folder.name))


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete the states under `root` but `newest` and the `keep` - 1 before it, and what kills have left half done."""
    older = [path for path in _states(root) if path != newest]
    for path in older[: max(0, len(older) - keep + 1)]:
        # A state that is half deleted must not look like one.
        path.rename(path.with_name(f".{path.name}.tmp"))
    for path in root.glob(".step*.tmp"):
        shutil.rmtree(path)
