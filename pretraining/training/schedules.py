"""Learning rate as a function of the position in training, and the clock of a run.

The schedules are those of academic-budget-bert (Izsak et al. 2021, section 3.3, and its released code): a warmup, then a curve.
The position is the number of finished steps, or the hours of training so far.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Schedule:
    """lr(p) = peak x warmup(p / W) for p < W, else peak x curve(p).

    warmup(r) = r, r^2 for the exponential curve. curve(p) = (total - p) / (total - W) for "linear",
    decay_rate^((p - W) / decay_step) for "exp", 1 for "const". At p = 0 with a warmup the learning rate is 0, as in the
    released code and in transformers' schedules.

    >>> schedule = Schedule(peak=1.0, total=100, warmup=20, curve="linear")
    >>> schedule(0), schedule(10), schedule(20), schedule(60), schedule(100), schedule(200)
    (0.0, 0.5, 1.0, 0.5, 0.0, 0.0)
    """

    peak: float  # highest learning rate
    total: float  # end of training, in steps or hours
    warmup: float  # end of the warmup W, in the same unit
    curve: str  # "linear", "exp" or "const"
    decay_rate: float = 0.99  # of "exp"
    decay_step: float = 1000  # of "exp", in the same unit

    def __call__(self, position: float) -> float:
        """The learning rate of the step that begins at `position` (steps done, or hours)."""
        if position < self.warmup:
            part = position / self.warmup
            return self.peak * (part**2 if self.curve == "exp" else part)
        if self.curve == "linear":
            # warmup = total leaves nothing to decay over.
            return self.peak * max(0.0, self.total - position) / max(self.total - self.warmup, 1e-12)
        if self.curve == "exp":
            return self.peak * self.decay_rate ** ((position - self.warmup) / self.decay_step)
        return self.peak

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Schedule":
        """The schedule of the command line; positions are hours for `--lr_schedule time`, else steps."""
        total = options.total_training_time if options.lr_schedule == "time" else options.max_steps
        is_constant = options.lr_schedule == "constant_step"
        warmup = options.num_warmup_steps if is_constant else options.warmup_proportion * total
        return cls(options.lr, total, warmup, options.curve, options.decay_rate, options.decay_step)


def clock(hours: float = 0.0, now: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """A function that returns the hours of training: those since now and `hours` before this process.

    >>> seconds = iter([100.0, 1900.0])
    >>> clock(hours=2.0, now=lambda: next(seconds))()
    2.5
    """
    start = now() - 3600 * hours
    return lambda: (now() - start) / 3600
