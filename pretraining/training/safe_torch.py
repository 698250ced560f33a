"""DeepSpeed's checkpoint files, read without executing what is pickled in them."""

from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pcfg.common.files import FILES, InputError, check_file, sha256

# All that DeepSpeed puts into a checkpoint of ZeRO 0, 1 or 2 beside tensors and Python's plain types. They hold numbers only.
SAFE_CLASSES = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of checkpoint files, which by itself loads with `weights_only=False`.

    Args:
        expected: SHA-256 of the files that may be loaded, by name.
    """

    def __init__(self, expected: dict[str, str] | None = None):
        super().__init__()
        self.expected = expected or {}

    def save(self, state_dict: dict, path: str) -> None:
        """Write `state_dict`. A full disk is an OSError here; where torch opens the file itself, it is a RuntimeError."""
        with open(path, "wb") as file:
            torch.save(state_dict, file)

    def load(self, path: str, map_location=None) -> dict:
        """The content of a file whose hash is the expected one, made of tensors, plain types and `SAFE_CLASSES` only.

        Raises:
            InputError: the hash is another one, or the file holds something else; nothing of it has been executed.
        """
        # One descriptor for both: what is loaded is what was hashed, even if the name has come to mean another file.
        with open(path, "rb") as file:
            check_file(Path(path), Path(path).parent / "state.json", {FILES: self.expected}, digest=sha256(file))
            file.seek(0)
            try:
                with torch.serialization.safe_globals(list(SAFE_CLASSES)):
                    return torch.load(file, map_location=map_location, weights_only=True)
            except Exception as error:  # whatever torch's reader makes of foreign bytes; its own text is long
                raise InputError(
                    f"{path}: refused ({type(error).__name__}), it holds more than tensors, numbers and DeepSpeed's loss "
                    "scale; it isn't a checkpoint of this project, delete the folder"
                ) from None
