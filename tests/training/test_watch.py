import os
import signal
from unittest import mock

import pytest
import torch

from pcfg.common.files import InputError
from pretraining.training.metrics import LossWatch, Signals


def test_signals_are_noted_and_only_a_second_ctrl_c_acts(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.received is None
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):  # a launcher passes on both
            os.kill(os.getpid(), number)
            assert signals.received is signal.SIGTERM
        monkeypatch.setattr(Signals, "SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_cpu_is_looked_at_at_once():
    watch = LossWatch(torch.device("cpu"), [""], {})
    watch.add("step 1", {"loss": torch.tensor([2.0])})
    with pytest.raises(InputError, match="step 2: the loss is nan"):
        watch.add("step 2", {"loss": torch.tensor([float("nan")])})
    with pytest.raises(InputError, match="step 3: the other loss is inf"):
        watch.add("step 3", {"loss": torch.tensor([2.0]), "other_loss": torch.tensor([float("inf")])})


def test_a_gpu_is_looked_at_a_step_later(monkeypatch):
    """`test_cuda.py` shows for what the host waits."""
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock)
    watch = LossWatch(torch.device("cuda"), [""], {})
    watch.add("step 1", {"loss": torch.tensor([float("inf")])})
    with pytest.raises(InputError, match="step 1: the loss is inf"):
        watch.add("step 2", {"loss": torch.tensor([2.0])})
    watch.add("step 3", {"loss": torch.tensor([1.0]), "other_loss": torch.tensor([float("-inf")])})
    with pytest.raises(InputError, match="step 3: the other loss is -inf"):
        watch.settle()
