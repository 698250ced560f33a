"""The training loop: steps, records, validation, model folders and training states."""

import argparse
import dataclasses
import datetime
import shlex
import sys
import time
from pathlib import Path

import torch

from pcfg.common.files import InputError, keyed_rng
from pcfg.common.ranks import Ranks
from pretraining.data.samples import Samples
from pretraining.model.checkpoints import save_model
from pretraining.training import state
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.arguments import job_folder
from pretraining.training.batches import global_batches, masked_loss, micro_batch, number_of_masks, rank_micro_batches
from pretraining.training.engine import LOWEST_LOSS_SCALE
from pretraining.training.metrics import Metrics
from pretraining.training.sample_stream import Shards
from pretraining.training.schedules import Clock, Schedule
from pretraining.training.state import Progress
from pretraining.training.validation import Gap, validation_loss
from pretraining.training.watch import LossWatch, Signals, check_finite

STATE_FOLDER = "training_state"


def model_folder(job: Path, step: int) -> Path:
    """Where the model of a step is saved."""
    return job / f"step{step:07d}"


@dataclasses.dataclass
class Data:
    """What a run trains and validates on, and how it is written.

    Attributes:
        train, test: shards; `test` None without validation.
        gap: measured at each validation; None if the grammar was not given.
        tokenizer: saved with each model.
        facts: for `args.json` and `state.json`: arguments, precision, versions, hashes.
        adversarial: its term is subtracted from the loss; None without one.
    """

    train: Shards
    test: Shards | None
    gap: Gap | None
    tokenizer: object
    facts: dict
    adversarial: AdversarialTerm | None = None


class Trainer:
    """Trains the model in `engine` from `progress` to the end of the run.

    All ranks do the same steps; which samples a step sees is a function of (seed, epoch, batch) and which units dropout
    drops of (seed, step, rank), so a run that is taken up again goes on as if it had not been interrupted.

    Args:
        options: the command line.
        engine: DeepSpeed's.
        ranks: this process among the others.
        data: shards, tokenizer, facts.
        progress: where to begin.
        now: seconds of a monotonic clock.
    """

    def __init__(self, options: argparse.Namespace, engine, ranks: Ranks, data: Data, progress: Progress, now=time.monotonic):
        self.options, self.engine, self.ranks, self.data, self.progress = options, engine, ranks, data, progress
        self.job = job_folder(options)
        self.schedule = Schedule.from_options(options)
        self.clock = Clock(progress.hours, now)
        self.metrics = Metrics(self.job, progress.step, options) if ranks.is_main else None
        self.losses = LossWatch(ranks.device)
        self.signals = Signals()
        self.lr = 0.0
        self.saved_step = progress.step
        self.is_interrupted = False
        self._started = self._speed_from = (progress.samples, time.perf_counter())

    def run(self) -> Path:
        """Train to the end; returns the folder of the final model, or of the training state if a signal ended the run."""
        try:
            with self.signals:
                if self.progress.step == 0 and 0 in self.options.save_steps:
                    self._save_model(final=False)
                while not self.stop_reason() and not self.is_interrupted:
                    self._run_epoch()
                return self._finish() if self.stop_reason() else self._interrupt()
        finally:
            for data in filter(None, (self.data.train, self.data.test)):
                data.close()
            if self.metrics is not None:
                self.metrics.close()

    def stop_reason(self) -> str | None:
        """Why no further step is due; None if one is."""
        options, progress = self.options, self.progress
        hours = min(options.total_training_time, options.early_exit_time_marker)
        if options.max_steps is not None and progress.step >= options.max_steps:
            return f"--max_steps {options.max_steps} reached"
        if progress.epoch >= options.num_epochs:
            return f"--num_epochs {options.num_epochs} reached"
        if progress.hours >= hours:
            return f"{hours} hours are over"
        return progress.stopped

    def _run_epoch(self) -> None:
        """The rest of the epoch that is under way."""
        options, progress = self.options, self.progress
        samples = self.data.train.read(progress.epoch)
        batches = global_batches(
            len(samples), options.train_batch_size, options.seed, progress.epoch, self.data.train.path(progress.epoch)
        )[: options.max_steps_per_epoch]  # (batches, train_batch_size)
        first = min(progress.batch, len(batches) - 1)  # other data or sizes may have come with a training state
        for index, rows in enumerate(batches[first:], start=first):
            losses = self._step(samples, rows)
            self.losses.add(f"step {progress.step} (batch {index} of epoch {progress.epoch})", losses)
            is_last = index == len(batches) - 1
            progress.epoch, progress.batch = (progress.epoch + 1, 0) if is_last else (progress.epoch, index + 1)
            self._after_step(losses, is_last)
            if self.stop_reason() or self.is_interrupted:
                return

    def _step(self, samples: Samples, rows) -> dict[str, torch.Tensor]:
        """One update from the global batch `rows`.

        Returns:
            Scalars for the record, the same on all ranks: "loss", the mean of its masked positions, and "adversarial_loss",
            without its weight, if there is one.
        """
        options, ranks, progress = self.options, self.ranks, self.progress
        progress.hours, self.is_interrupted = ranks.agree(self.clock.hours(), self.signals.received is not None)
        self.lr = self.schedule(progress.hours if options.lr_schedule == "time" else progress.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr
        torch.manual_seed(int(keyed_rng(options.seed, "dropout", progress.step, ranks.rank).integers(1 << 63)))

        masks = number_of_masks(samples, rows)
        loss = torch.zeros((), device=ranks.device)
        size = options.train_micro_batch_size_per_gpu
        for part in rank_micro_batches(samples, rows, size, ranks.rank, ranks.size):
            # A rank without a sentence left takes one times 0: all ranks go through the same collectives.
            batch = micro_batch(samples, part if len(part) else rows[:1]).to(ranks.device)
            share = masked_loss(self.engine, batch) * (len(part) > 0) / masks
            # The loss of a step is the mean over the masked positions of the GLOBAL batch, so that grouping changes nothing.
            # Every rank knows their number without asking. DeepSpeed averages gradients over ranks, hence world_size; its
            # division by the number of accumulation steps is turned off.
            self.engine.backward(share * ranks.size, scale_wrt_gas=False)
            loss += share.detach()
        losses = {"loss": loss}
        if self.data.adversarial is not None:
            # Every rank computes all of the term, so DeepSpeed's mean over ranks is right. The record's is added up from equal
            # parts: either all ranks see that it is not finite, or none.
            term = self.data.adversarial.loss(self.engine, progress.step)
            self.engine.backward(-options.adversarial_weight * term, scale_wrt_gas=False)
            losses["adversarial_loss"] = term.detach() / ranks.size
        self.engine.step()
        progress.step += 1
        progress.samples += len(rows)
        progress.tokens += int(samples.input_mask[rows].sum())
        return {name: ranks.sum_on_device(part) for name, part in losses.items()}

    def _after_step(self, losses: dict[str, torch.Tensor], is_end_of_epoch: bool) -> None:
        """Records, validation, model folders and stopping, as they are due."""
        options, progress = self.options, self.progress
        if self.data.facts["precision"] == "float16":
            self._check_loss_scale()
        if progress.step % options.print_steps == 0 or self.stop_reason():
            self._record(losses)
        elif options.log_throughput_every and progress.step % options.log_throughput_every == 0 and self.ranks.is_main:
            print(f"step {progress.step}: {self._speed():,.0f} sentences/s")
        validates = is_end_of_epoch and self._is_validation_due()
        if validates:
            self._validate()
        # The final model and state are saved by _finish.
        if self.stop_reason():
            return
        saves = progress.step in options.save_steps or self._is_folder_due(is_end_of_epoch)
        if saves:
            self._save_model(final=False)
        if saves or validates:
            self._save_state()

    def _check_loss_scale(self) -> None:
        """Stop a float16 run that stays at the lowest loss scale: its gradients overflow whatever the scale."""
        is_lowest = self.engine.optimizer.loss_scale <= LOWEST_LOSS_SCALE
        self.progress.lowest_scale_steps = self.progress.lowest_scale_steps + 1 if is_lowest else 0
        if self.progress.lowest_scale_steps >= self.options.scale_cnt_limit:
            self.progress.stopped = f"loss scale {LOWEST_LOSS_SCALE} in {self.options.scale_cnt_limit} steps"

    def _is_folder_due(self, is_end_of_epoch: bool) -> bool:
        """Whether an epoch or a time marker ends here at which a model folder is wanted."""
        options, progress = self.options, self.progress
        passed = sum(progress.hours >= part * options.total_training_time for part in options.finetune_time_markers)
        is_due, progress.time_markers = passed > progress.time_markers, passed
        every = options.num_epochs_between_checkpoints
        return is_due or (is_end_of_epoch and every > 0 and progress.epoch % every == 0)

    def _is_validation_due(self) -> bool:
        """Whether to validate after the epoch that has ended: the interval differs in the first and the last part."""
        options, progress = self.options, self.progress
        if not options.do_validation:
            return False
        if options.lr_schedule == "time":
            part = progress.hours / options.total_training_time
        else:
            part = progress.step / options.max_steps
        if part < options.validation_begin_proportion:
            return progress.epoch % options.validation_epochs_begin == 0
        if part > 1 - options.validation_end_proportion:
            return progress.epoch % options.validation_epochs_end == 0
        return progress.epoch % options.validation_epochs == 0

    def _validate(self) -> None:
        """Measure and record the loss on the test shards."""
        options, progress = self.options, self.progress
        self.losses.settle()
        loss, masks = validation_loss(self.engine, self.data.test, options.validation_micro_batch, self.ranks)
        progress.validation_loss, progress.validated_step = loss, progress.step
        gap = self.data.gap.measure(self.engine.module) if self.data.gap is not None and self.ranks.is_main else {}
        self._write({"validation_loss": loss, "validation_masks": masks, **gap})
        check_finite(loss, f"step {progress.step}", "validation loss")
        minutes = 60 * progress.hours
        if options.use_early_stopping and minutes > options.early_stop_time and loss > options.early_stop_eval_loss:
            progress.stopped = (
                f"validation loss {loss:.4f} above --early_stop_eval_loss {options.early_stop_eval_loss} after "
                f"{minutes:.1f} minutes"
            )

    def _record(self, losses: dict[str, torch.Tensor]) -> None:
        """Record the losses of the step that has ended, the learning rate and the speed."""
        self.losses.settle()
        values = {name: loss.item() for name, loss in losses.items()}
        self._write({**values, "lr": self.lr, "sentences_per_second": self._speed()})

    def _speed(self) -> float:
        """Sentences a second since the last call."""
        (samples, since), self._speed_from = self._speed_from, (self.progress.samples, time.perf_counter())
        return (self.progress.samples - samples) / max(self._speed_from[1] - since, 1e-9)

    def _seconds_left(self) -> float:
        """Until the end of the run, at the mean speed since this process began."""
        options, progress = self.options, self.progress
        left = 3600 * (min(options.total_training_time, options.early_exit_time_marker) - progress.hours)
        samples, since = self._started
        if options.max_steps is not None and progress.samples > samples:
            wanted = (options.max_steps - progress.step) * options.train_batch_size
            left = min(left, wanted * (time.perf_counter() - since) / (progress.samples - samples))
        return max(left, 0.0)

    def _write(self, values: dict) -> None:
        """A record on the disk and a line on the screen, by the main rank."""
        if not self.ranks.is_main:
            return
        progress = self.progress
        position = {"step": progress.step, "epoch": progress.epoch, "samples": progress.samples}
        self.metrics.write({**position, **values, "seconds": 3600 * progress.hours})
        shown = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
        of = f"/{self.options.max_steps}" if self.options.max_steps else ""
        left = datetime.timedelta(seconds=round(self._seconds_left()))
        print(f"step {progress.step}{of}  {shown}  ({3600 * progress.hours:.1f} s, {left} left)", flush=True)

    def _save_model(self, final: bool) -> Path:
        """Write the model folder of this step."""
        self._check_sound()
        progress, facts = self.progress, self.data.facts
        folder = model_folder(self.job, progress.step)
        if self.ranks.is_main:
            counts = {"step": progress.step, "epoch": progress.epoch, "samples_seen": progress.samples}
            counts |= {"tokens_seen": progress.tokens, "hours": progress.hours, "final": final}
            save_model(folder, self.engine.module, self.data.tokenizer, self.data.train.vocabulary, {**counts, **facts})
            print(f"model: {folder}", flush=True)
        self.ranks.wait()
        return folder

    def _save_state(self) -> None:
        """Write a training state of this step."""
        self._check_sound()
        if self.metrics is not None:
            self.metrics.sync()  # no state may be ahead of its records
        facts = {"progress": dataclasses.asdict(self.progress), **self.data.facts}
        state.save(self.engine, self.job / STATE_FOLDER, self.ranks, facts, self.options.keep_checkpoints)
        self.saved_step = self.progress.step

    def _check_sound(self) -> None:
        """Refuse to save what can't be gone on from: losses and weights must be finite."""
        self.losses.settle()
        if not torch.stack([parameter.isfinite().all() for parameter in self.engine.module.parameters()]).all():
            raise InputError(
                f"step {self.progress.step}: a weight is NaN or infinite; try a smaller --lr, a longer warmup or "
                "--gradient_clipping 1.0; the last training state and model folder are kept"
            )

    def _interrupt(self) -> Path:
        """Save a training state after a signal and say how to go on; returns its folder."""
        if self.saved_step != self.progress.step:
            self._save_state()
        folder = state.latest(self.job / STATE_FOLDER)
        if self.ranks.is_main:
            words = [word for word in sys.argv if not word.startswith("--local_rank")]  # the launcher's own
            how = "python" if self.ranks.size == 1 else "with the same launcher, on as many ranks:"
            print(f"{self.signals.received or 'a signal'} at step {self.progress.step}; training state: {folder}")
            print(f"go on: {how} {shlex.join(words)}", flush=True)
        return folder

    def _finish(self) -> Path:
        """Last validation, training state and model; the final model is the mark that the run is complete."""
        if self.options.do_validation and self.progress.validated_step != self.progress.step:
            self._validate()
        if self.saved_step != self.progress.step:
            self._save_state()
        if self.ranks.is_main:
            print(f"finished: {self.stop_reason()}")
        return self._save_model(final=True)
