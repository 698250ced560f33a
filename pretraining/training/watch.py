"""What can end a run early: a signal, and a loss that is not finite."""

import contextlib
import math
import signal

import torch

from pcfg.common.files import InputError


class Signals:
    """Within its block, the first SIGTERM or SIGINT is only noted, so that a step can be finished; a second one acts as usual.

    Attributes:
        received: the name of the signal, None without any.
    """

    def __init__(self):
        self.received: str | None = None

    def _note(self, number: int, frame) -> None:  # noqa: ARG002 (signal.signal asks for it)
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Signals":
        self._usual = {}
        with contextlib.suppress(ValueError):  # not the main thread (a notebook's worker): signals stay as they are
            for number in (signal.SIGTERM, signal.SIGINT):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        self._restore()


class LossWatch:
    """Looks at the loss of every step without making the host wait for the device.

    On a GPU the loss of a step is read when the next step has been queued, so that the device is never idle; on the CPU at
    once.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device):
        self._delay = 0 if device.type == "cpu" else 1
        self._unseen: list[tuple[str, dict[str, torch.Tensor]]] = []

    def add(self, where: str, losses: dict[str, torch.Tensor]) -> None:
        """Take the losses of a step; checks those that are due.

        Args:
            where: step and batch, for the message.
            losses: scalars by their names in the records, the same on all ranks.

        Raises:
            InputError: a loss is NaN or infinite.
        """
        self._unseen.append((where, losses))
        self._check(keep=self._delay)

    def settle(self) -> None:
        """Check all that were added.

        Raises:
            InputError: as `add`.
        """
        self._check(keep=0)

    def _check(self, keep: int) -> None:
        while len(self._unseen) > keep:
            where, losses = self._unseen.pop(0)
            for name, loss in losses.items():
                check_finite(loss.item(), where, name.replace("_", " "))


def check_finite(loss: float, where: str, what: str) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        InputError: names where it was seen and what can be tried.
    """
    if not math.isfinite(loss):
        raise InputError(
            f"{where}: the {what} is {loss}; try a smaller --lr, a longer warmup or --gradient_clipping 1.0; the last training "
            "state and model folder are kept"
        )
