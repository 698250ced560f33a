"""The training loop, `Trainer.run`, and its parts: steps, records, validation, model folders and training states."""

import argparse
import dataclasses
import datetime
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NoReturn

import numpy as np
import torch

from pcfg.common.cli import Interrupted
from pcfg.common.files import InputError
from pcfg.common.ranks import Ranks
from pretraining.data.samples import Samples
from pretraining.model.checkpoints import save_model
from pretraining.training import branches, state
from pretraining.training.arguments import job_folder, member_folders
from pretraining.training.batches import GlobalBatch, MicroBatch, count_masks, global_batches, micro_batch, rank_micro_batches
from pretraining.training.engine import LOWEST_LOSS_SCALE, Schedule
from pretraining.training.learner import Learner, Member
from pretraining.training.metrics import LossWatch, Metrics, Signals, diverged_error
from pretraining.training.sample_stream import Shards
from pretraining.training.state import Progress, RunFacts

STATE_FOLDER = "training_state"
Z = 1.96  # of a 95% interval
FORECAST_STEPS = 10  # after which a run knows how long its steps take


def clock(hours: float) -> Callable[[], float]:
    """A function that returns the hours of training: those since now and `hours` before this process."""
    start = monotonic() - 3600 * hours
    return lambda: (monotonic() - start) / 3600


@dataclasses.dataclass
class Data:
    """The data of a run."""

    members: tuple[Member, ...]  # in the order of the learner's models
    test: Shards | None  # None without validation
    tokenizer: Any  # saved with each model


@dataclasses.dataclass
class Trainer:
    """Trains the models in `learner` from `progress`, which is updated, to the end of the run, or of the branch of a `trunk`.

    All ranks do the same steps. The samples of a step are a function of (seed, epoch, batch), its dropout masks of (seed, step,
    rank): a resumed run continues as if it had not been interrupted.
    """

    options: argparse.Namespace
    learner: Learner
    ranks: Ranks
    data: Data
    facts: RunFacts
    progress: Progress
    state_folder: Path | None = None  # a training state of the present step
    trunk: "Trainer | None" = None

    def __post_init__(self) -> None:
        progress = self.progress
        self.members = self.data.members
        self.schedule = Schedule.from_options(self.options)
        self.is_timed = self.options.lr_schedule == "time"  # whether positions in the schedule are hours, not steps
        self.clock = clock(progress.hours)
        self.states = job_folder(self.options) / STATE_FOLDER
        self.metrics: Metrics | None = None
        if self.trunk is not None:
            self.states /= f"branch{self.trunk.progress.step:07d}"
            self.metrics = self.trunk.metrics
        elif self.ranks.is_main:
            self.metrics = Metrics(job_folder(self.options), progress.step, self.options)
        names = [""] if self.facts.stacked is None else [f"seed {member.seed}" for member in self.members]
        self.loss_watch = LossWatch(self.ranks.device, names, progress.diverged)
        self.signals: Signals = self.trunk.signals if self.trunk else Signals()
        self.lr = 0.0
        self._first_step = self.saved_step = progress.step
        self.saved_hours = progress.hours  # of the newest state, or of this process's start
        self.gaps: list[dict[str, float]] = []  # the newest, on the main rank
        self.is_interrupted = False
        # Sentences and time, at the start of this process and at the last measurement of the speed.
        self._started = (progress.samples, perf_counter())
        self._speed_from = self._started

    def run(self) -> Path:
        """Train to the end; returns the folder of the final model. `Interrupted` if a signal ended the run, with its state."""
        try:
            with self.signals:
                return self.train()
        finally:
            for shards in filter(None, (*(member.train for member in self.members), self.data.test)):
                shards.close()
            if self.metrics is not None:
                self.metrics.close()

    def train(self) -> Path:
        """The training loop; returns what `run` returns."""
        self.warn_of_warmup(self._end(), "when this run ends")
        if self.progress.step == 0 and 0 in self.options.save_steps:
            self.save_model(final=False)
        if not self.stop_reason():
            self.cool_down()  # an interrupted branch
        for batches in self.batches():
            self.follow_schedule()
            losses = self.learner.accumulate(self.progress.step, batches, self.members)
            self.learner.step(self.lr)
            self.advance(batches, losses)
            self.record(losses)
            self.validate_and_save(is_end_of_epoch=batches[0].is_last)
            if self.progress.step == self._first_step + FORECAST_STEPS and self.is_timed:
                self.warn_of_warmup(self._end(), "when this run ends")
        if not self.stop_reason():
            self.interrupt()
        return self.finish()

    def batches(self) -> Iterator[list[GlobalBatch]]:
        """The global batches from here on, one per member, epoch by epoch, until no further step is due."""
        options = self.options
        while not self.stop_reason() and not self.is_interrupted:
            epochs = [self._epoch(member) for member in self.members]
            number = len(epochs[0][1])  # of steps, the same for all members
            end = self.progress.step + number - self.progress.batch  # of the epoch
            if self.progress.epoch + 1 < options.num_epochs and (options.max_steps is None or end < options.max_steps):
                for member in self.members:
                    member.train.read(self.progress.epoch)  # and the next one, in advance
            # A training state may come from a run with larger shards or smaller batches.
            for index in range(min(self.progress.batch, number - 1), number):
                yield [GlobalBatch(samples, rows[index], index, index == number - 1) for samples, rows in epochs]
                if self.stop_reason() or self.is_interrupted:
                    return

    def _epoch(self, member: Member) -> tuple[Samples, np.ndarray]:
        """The samples of a member in the present epoch, and the rows of each global batch, (batches, train_batch_size)."""
        options = self.options
        epoch = self.progress.epoch
        samples = member.train.read(epoch, ahead=False)
        path = member.train.path(epoch)
        if len(samples) < (options.cooldown_batch_size or 0):
            raise InputError(
                f"{path}: has {len(samples)} samples, fewer than --cooldown_batch_size {options.cooldown_batch_size}; make a "
                "smaller batch or larger shards"
            )
        all_rows = global_batches(len(samples), options.train_batch_size, member.stream, epoch, path)
        return samples, all_rows[: options.max_steps_per_epoch]

    def stop_reason(self) -> str | None:
        """Why no further step is due; None if one is."""
        options = self.options
        progress = self.progress
        hours = min(options.total_training_time, options.early_exit_time_marker)
        if options.max_steps is not None and progress.step >= options.max_steps:
            return f"--max_steps {options.max_steps} reached"
        if progress.epoch >= options.num_epochs:
            return f"--num_epochs {options.num_epochs} reached"
        if progress.hours >= hours:
            return f"{hours} hours are over"
        return progress.stopped

    def follow_schedule(self) -> None:
        """Agree with all ranks on the time and on signals, and determine the learning rate of the step."""
        progress = self.progress
        progress.hours, self.is_interrupted = self.ranks.agree(self.clock(), self.signals.received is not None)
        self.lr = self.schedule(self._position())

    def advance(self, batches: list[GlobalBatch], losses: dict[str, torch.Tensor]) -> None:
        """Count the step that has ended, and check that its losses are finite and its float16 arithmetic works."""
        progress = self.progress
        batch = batches[0]
        progress.step += 1
        progress.samples += len(batch.rows)
        progress.tokens += sum(int(part.samples.input_mask[part.rows].sum()) for part in batches)
        self.loss_watch.add(f"{self._where()} (batch {batch.index} of epoch {progress.epoch})", losses)
        progress.epoch += int(batch.is_last)
        progress.batch = 0 if batch.is_last else batch.index + 1
        if self.learner.loss_scale is not None:
            # At the lowest scale, gradients that overflow will always do so.
            is_lowest = self.learner.loss_scale <= LOWEST_LOSS_SCALE
            progress.lowest_scale_steps = progress.lowest_scale_steps + 1 if is_lowest else 0
            if progress.lowest_scale_steps >= self.options.scale_cnt_limit:
                progress.stopped = f"loss scale {LOWEST_LOSS_SCALE} in {self.options.scale_cnt_limit} steps"

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Record the losses, the learning rate and the speed, or print the speed, at the steps where that is due."""
        step = self.progress.step
        throughput_every = self.options.log_throughput_every
        if step % self.options.print_steps == 0 or self.stop_reason():
            self.loss_watch.settle()
            shared = {"lr": self.lr, "sentences_per_second": self._speed()}
            self._write([{**values, **shared} for values in self._by_member(losses)])
        elif throughput_every and step % throughput_every == 0 and self.ranks.is_main:
            print(f"step {step}: {self._speed():,.0f} sentences/s")

    def validate_and_save(self, is_end_of_epoch: bool) -> None:
        """Validate, measure the gap, save a model folder and a training state, and train a branch, as they are due."""
        options = self.options
        step = self.progress.step
        validates = is_end_of_epoch and self._is_validation_due()
        if validates:
            self.validate()
        if self.trunk is None and options.gap_steps and step % options.gap_steps == 0:
            self.record_gap()
            self.compare_with_target()
        if self.stop_reason():
            return  # `finish` saves the final model and state
        is_asked_for = step in options.save_steps or branches.is_branch_due(options, self.progress)
        saves = self._is_folder_due(is_end_of_epoch) or is_asked_for
        if saves:
            self.save_model(final=False)
        if saves or validates or 60 * (self.progress.hours - self.saved_hours) >= options.save_state_minutes:
            self.save_state()
        self.cool_down()

    def warn_of_warmup(self, position: float, when: str) -> None:
        """Print a warning if the learning rate is in its warmup at `position`, in the schedule's unit."""
        warmup = self.schedule.warmup
        if self.ranks.is_main and self.trunk is None and 0 < position <= warmup:
            flag = "--num_warmup_steps" if self.options.lr_schedule in ("constant_step", "wsd") else "--warmup_proportion"
            unit, or_else = ("hours", " or --total_training_time") if self.is_timed else ("steps", "")
            print(
                f"warning: {when}, the learning rate still rises: {position:.3g} of {warmup:.3g} {unit} of warmup; "
                f"give a smaller {flag}{or_else}, or train longer",
                flush=True,
            )

    def _end(self) -> float:
        """The position in the schedule at which the run ends if its limits hold, at the mean speed since this process began."""
        return self.progress.hours + self._seconds_left() / 3600 if self.is_timed else self.options.max_steps

    def _position(self) -> float:
        """The present position in the schedule."""
        return self.progress.hours if self.is_timed else self.progress.step

    def _is_folder_due(self, is_end_of_epoch: bool) -> bool:
        """Whether a time marker has passed, or a number of epochs after which a model folder is saved."""
        progress = self.progress
        total = self.options.total_training_time
        passed = sum(progress.hours >= part * total for part in self.options.finetune_time_markers)
        is_marker_due = passed > progress.time_markers
        progress.time_markers = passed
        every = self.options.num_epochs_between_checkpoints
        return is_marker_due or (is_end_of_epoch and every > 0 and progress.epoch % every == 0)

    def _is_validation_due(self) -> bool:
        """Whether to validate after the epoch that has ended: the interval differs in the first and the last part."""
        options = self.options
        progress = self.progress
        if not options.do_validation:
            return False
        part = progress.hours / options.total_training_time if self.is_timed else progress.step / options.max_steps
        every = options.validation_epochs
        if part < options.validation_begin_proportion:
            every = options.validation_epochs_begin
        elif part > 1 - options.validation_end_proportion:
            every = options.validation_epochs_end
        return progress.epoch % every == 0

    def validate(self) -> None:
        """Measure and record the loss on the test shards, and the gap to the entropy if a grammar is given."""
        options = self.options
        progress = self.progress
        self.loss_watch.settle()
        losses, masks = self._validation_losses()
        for index in (~losses.isfinite()).nonzero().flatten().tolist():
            self.loss_watch.leave_out(index, f"{self._where()}: the validation loss is {losses[index].item()}")
        loss = float(losses[self.loss_watch.living()].mean())
        progress.validation_loss = loss
        progress.validated_step = progress.step
        gaps = self._gaps()
        records = self._by_member({"validation_loss": losses})
        self._write([{**record, "validation_masks": masks, **gap} for record, gap in zip(records, gaps, strict=True)])
        minutes = 60 * progress.hours
        if options.use_early_stopping and minutes > options.early_stop_time and loss > options.early_stop_eval_loss:
            progress.stopped = (
                f"validation loss {loss:.4f} above --early_stop_eval_loss {options.early_stop_eval_loss} after "
                f"{minutes:.1f} minutes"
            )

    def _validation_losses(self) -> tuple[torch.Tensor, int]:
        """Mean of -log f over the masked positions of all test shards, in nats, (members,) float64, and their number.

        Sums and counts are added over all batches and ranks; there is one division, at the end.
        """
        ranks = self.ranks
        packing = self.learner.packing
        shards = self.data.test
        assert shards is not None
        masks = 0

        def batches() -> Iterator[MicroBatch]:
            nonlocal masks
            for index in range(len(shards.paths)):
                samples = shards.read(index, ahead=index + 1 < len(shards.paths))
                least = packing.most_tokens // shards.max_seq_length if ranks.device.type == "cuda" else 1  # to keep it busy
                size = max(least, self.options.validation_micro_batch)
                for rows in rank_micro_batches(samples, np.arange(len(samples)), size, packing, ranks.rank, ranks.size):
                    if len(rows):
                        masks += count_masks(samples, rows)
                        yield micro_batch(samples, rows, packing)

        losses = self.learner.validation_loss(batches())
        total = ranks.sum_on_host(np.array([*losses.tolist(), masks], dtype=np.float64))
        return torch.from_numpy(total[:-1] / total[-1]), int(total[-1])

    def _gaps(self) -> list[dict[str, float]]:
        """Measure the gap of each member, in nats by names for the record: on the main rank, empty without a grammar."""
        self.gaps = [{} for _ in self.members]
        if self.ranks.is_main:
            models = self.learner.models()
            for index in self.loss_watch.living():
                measure_gap = self.members[index].measure_gap
                self.gaps[index] = measure_gap(models[index]) if measure_gap else {}
        self.progress.gap_step = self.progress.step
        return self.gaps

    def record_gap(self) -> None:
        """Measure and record the gap with --gap_steps, unless this step has it."""
        if self.options.gap_steps and self.progress.gap_step != self.progress.step:
            self._write(self._gaps())

    def compare_with_target(self) -> None:
        """End the trunk if the gap of this step is below --target_gap."""
        target = self.options.target_gap
        if target is None:
            return
        progress = self.progress
        largest = max(gap["gap_sentences"] + Z * gap["gap_sentences_se"] for gap in filter(None, self.ranks.of_main(self.gaps)))
        progress.is_below_target = largest < target
        if progress.is_below_target:
            progress.stopped = f"upper end of the gap {largest:.4f} nats, below --target_gap {target:g}"

    def save_model(self, final: bool) -> Path:
        """Write each member's model folder of this step; returns that of the first."""
        self._check_sound()
        self.record_gap()
        step = self.trunk.progress.step if self.trunk else self.progress.step
        name = branches.cooled_name(step) if self.trunk else f"step{step:07d}"
        folders = []
        models = self.learner.models() if self.ranks.is_main else []
        for index in self.loss_watch.living():
            member = self.members[index]
            folders.append(member_folders(self.options)[index] / name)
            if self.ranks.is_main:
                facts = self._counts(final) | self.facts.model_dump(exclude_unset=True) | {"seed": member.seed}
                save_model(folders[-1], models[index], self.data.tokenizer, member.train.vocabulary, facts)
                print(f"model: {folders[-1]}", flush=True)
        self.ranks.wait()
        return folders[0]

    def _counts(self, final: bool) -> dict[str, Any]:
        """How far the run is, for `args.json`; tokens are the mean over members."""
        options = self.options
        progress = self.progress
        counts: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, "samples_seen": progress.samples}
        counts |= {"tokens_seen": round(progress.tokens / len(self.members)), "hours": progress.hours, "final": final}
        if progress.diverged:
            counts["diverged"] = progress.diverged
        if self.trunk is not None:
            step = self.trunk.progress.step
            counts |= {"step": step, "cooled": True, "branch": step, "cooldown_steps": progress.step}
        elif final and options.lr_schedule == "wsd":
            counts["branches"] = self._branches()
        return counts

    def save_state(self) -> None:
        """Write a training state of this step."""
        self._check_sound()
        if self.metrics is not None:
            self.metrics.sync()  # no state may be ahead of its records
        arguments = (self.ranks, self.facts, self.progress, self.options.keep_checkpoints)
        self.state_folder = state.save(self.learner, self.states, *arguments)
        self.saved_step = self.progress.step
        self.saved_hours = self.progress.hours

    def cool_down(self) -> None:
        """Train the branch that begins at this step, if any, unless its models are there; the learner is then as before.

        A signal interrupts the branch, and the trunk with it.
        """
        if not branches.is_branch_due(self.options, self.progress) or self.is_interrupted:
            return
        assert self.state_folder is not None
        step = self.progress.step
        states = self.states / f"branch{step:07d}"
        if not self.ranks.of_main(self.ranks.is_main and branches.cooled_models(self.options, step) is not None):
            branch = self._branch(states)
            try:
                branch.train()
            finally:
                for member in branch.members:
                    member.train.close()
            self.clock = clock(branch.progress.hours)
            self.learner.load(self.state_folder, state.read(self.state_folder).files)
            self._started = self._speed_from = (self.progress.samples, perf_counter())
        if self.ranks.is_main and states.exists():
            shutil.rmtree(states)

    def _branch(self, states: Path) -> "Trainer":
        """The branch of this step: at its newest training state, else at its beginning."""
        start = self.ranks.of_main(self.ranks.is_main and branches.branch_state(states, self.facts)) or None
        progress = start.progress() if start else branches.branch_progress(self.progress)
        step = self.progress.step
        if start is not None:
            self.learner.load(start.folder, start.saved.files)
        if self.metrics is not None:
            self.metrics.begin_branch(step, step + progress.step)
            print(f"branch of step {step}, from its step {progress.step}", flush=True)
        data = dataclasses.replace(self.data, members=branches.branch_members(self.members, step))
        options = branches.branch_options(self.options, self.schedule(step))
        shared = (self.learner, self.ranks, data, self.facts)
        return Trainer(options, *shared, progress, start and start.folder, trunk=self)

    def finish(self) -> Path:
        """Last validation, training state, branch and model; the final model marks the run as complete."""
        if self.options.do_validation and self.progress.validated_step != self.progress.step:
            self.validate()
        self.record_gap()
        if self.trunk is not None:
            return self.save_model(final=False)
        if self.saved_step != self.progress.step:
            self.save_state()
        self.cool_down()
        if self.is_interrupted and branches.is_branch_due(self.options, self.progress):
            self.interrupt()
        if self.ranks.is_main:
            print(f"finished: {self.stop_reason()}")
            self.warn_of_warmup(self._position(), "at the end")
        folder = self.save_model(final=True)
        diverged = dict(self.progress.diverged)
        # Of several ranks there is one model, whose divergence has ended the run. Nothing is exchanged here: a thread of gloo
        # that still held the last object when the interpreter has ended would abort the process.
        for step in self._branches() if self.ranks.size == 1 else ():
            diverged |= branches.cooled_models(self.options, step) or {}
        if diverged:
            raise diverged_error(diverged)
        return folder

    def _branches(self) -> list[int]:
        """The steps of the trunk's branches so far."""
        if self.options.lr_schedule != "wsd":
            return []
        step = self.progress.step
        last = [step] if branches.is_branch_due(self.options, self.progress) else []
        return sorted({*(branch for branch in self.options.branch_steps if branch <= step), *last})

    def interrupt(self) -> NoReturn:
        """After a signal: save a training state, print how to resume, and raise `Interrupted`."""
        if self.saved_step != self.progress.step or self.state_folder is None:
            self.save_state()
        received = self.signals.received or signal.SIGTERM  # of another rank
        if self.ranks.is_main:
            words = [word for word in sys.argv if not word.startswith("--local_rank")]  # the launcher's own
            how = "python" if self.ranks.size == 1 else "with the same launcher, on as many ranks:"
            print(f"{received.name} at {self._where()}; training state: {self.state_folder}")
            print(f"go on: {how} {shlex.join(words)}", flush=True)
        raise Interrupted(received, self.state_folder)

    def _where(self) -> str:
        """The present step, in words."""
        step = f"step {self.progress.step}"
        return f"{step} of the branch of step {self.trunk.progress.step}" if self.trunk else step

    def _check_sound(self) -> None:
        """Refuse to save what no run can resume from: losses and weights must be finite."""
        self.loss_watch.settle()
        for index, model in enumerate(self.learner.models()):
            if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
                self.loss_watch.leave_out(index, f"{self._where()}: a weight is NaN or infinite")

    def _by_member(self, losses: dict[str, torch.Tensor]) -> list[dict[str, float]]:
        """Losses (members,) by name as numbers, a dictionary for each member."""
        columns = {name: loss.tolist() for name, loss in losses.items()}
        return [{name: column[index] for name, column in columns.items()} for index in range(len(self.members))]

    def _write(self, values: list[dict[str, float]]) -> None:
        """A record per member on the disk, and a line with their mean on the screen, by the main rank."""
        if self.metrics is None:
            return
        progress = self.progress
        position: dict[str, float] = {"step": progress.step, "epoch": progress.epoch, "samples": progress.samples}
        if self.trunk is not None:
            branch = self.trunk.progress.step
            position |= {"step": branch + progress.step, "branch": branch}
        living = self.loss_watch.living()
        for index in living:
            name = {} if self.facts.stacked is None else {"seed": self.members[index].seed}
            self.metrics.write({**position, **name, **values[index], "seconds": 3600 * progress.hours})
        mean = {name: sum(values[index][name] for index in living) / len(living) for name in values[living[0]]}
        shown = "  ".join(f"{name} {value:.6g}" for name, value in mean.items())
        of = f"/{self.options.max_steps}" if self.options.max_steps else ""
        left = datetime.timedelta(seconds=round(self._seconds_left()))
        prefix = f"branch {self.trunk.progress.step}, " if self.trunk else ""
        print(f"{prefix}step {progress.step}{of}  {shown}  ({3600 * progress.hours:.1f} s, {left} left)", flush=True)

    def _speed(self) -> float:
        """Sentences per second since the last call."""
        samples, since = self._speed_from
        self._speed_from = (self.progress.samples, perf_counter())
        return (self.progress.samples - samples) / max(self._speed_from[1] - since, 1e-9)

    def _seconds_left(self) -> float:
        """Until the end of the run, at the mean speed since this process began."""
        options = self.options
        progress = self.progress
        left = 3600 * (min(options.total_training_time, options.early_exit_time_marker) - progress.hours)
        samples, since = self._started
        if options.max_steps is not None and progress.samples > samples:
            sentences = (options.max_steps - progress.step) * options.train_batch_size
            left = min(left, sentences * (perf_counter() - since) / (progress.samples - samples))
        return max(left, 0.0)
