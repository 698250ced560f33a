"""What a plan consists of: commands, and the pre-training runs that some of them are."""

import dataclasses
import shlex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command and what it hangs on.

    Attributes:
        name: unique, the command's in status.json.
        words: of the command line; `$OUT` in them is the folder of everything.
        needs: commands that must be done before it.
        after: commands that must have ended, one at least well: a measurement of several runs does without one that failed.
        requires: a file that an earlier command makes or, for a reason that it prints, does not.
        makes: files and folders that are there when it is done; a command without `makes` and `records` is always run.
        records: (model folder, file): measurements that are there when it is done, of those folders that are models.
        seconds, size: expected time and bytes on the disk.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    requires: str | None = None
    makes: tuple[str, ...] = ()
    records: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    size: float = 0.0

    @property
    def command(self) -> str:
        """The command line, as one types it after `OUT=...`."""
        return " ".join(word if "$OUT" in word else shlex.quote(word) for word in self.words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A pre-training run: `models/FOLDER/seedS`.

    Attributes:
        folder: below models/, of all seeds of one kind.
        size: name in the scale.
        last: its last step; `saved` the steps before that are kept.
        flags: of run_pretraining.py, beside those that all runs have.
        requires: see `Step`.
        extra: how many times the arithmetic of a plain step it takes.
    """

    folder: str
    size: str
    seed: int
    last: int
    saved: tuple[int, ...]
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    requires: str | None = None
    extra: float = 1.0

    @property
    def name(self) -> str:
        return f"train {self.folder} seed {self.seed}"

    def model(self, step: int) -> str:
        return f"models/{self.folder}/seed{self.seed}/step{step:07d}"

    @property
    def all_saved(self) -> list[int]:
        return sorted({*self.saved, self.last})

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(map(self.model, self.all_saved))
