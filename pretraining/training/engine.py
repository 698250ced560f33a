"""DeepSpeed's engine for a masked language model."""

import argparse
import logging
import os

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch import nn

from pcfg.common.ranks import Ranks
from pretraining.training.optimizers import build_optimizer

# The loss scale of float16: DeepSpeed halves it on overflow, down to this.
LOWEST_LOSS_SCALE = 1


def start_ranks(options: argparse.Namespace) -> Ranks:
    """The processes of a run, on the devices and with the backend that DeepSpeed picks."""
    local_rank = max(0, int(os.environ.get("LOCAL_RANK", options.local_rank)))
    accelerator = get_accelerator()
    device = "cpu"
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile its shared-memory reduction at the first start, for 40 s.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    else:
        accelerator.set_device(local_rank)
        device = accelerator.device_name(local_rank)
    return Ranks(device, accelerator.communication_backend_name())


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices by instructions of its own; without them float32 is 100 times faster."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_tile"))


def precision(options: argparse.Namespace, device: torch.device) -> str:
    """What the arithmetic is done in: "float32", "bfloat16" or "float16".

    `--fp16` asks for the fast one: float16 on CUDA; on a CPU bfloat16 if it has instructions for it, else float32.
    """
    if options.fp16 and device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    return "float16" if options.fp16 else "bfloat16" if options.bf16 else "float32"


def zero_stage(options: argparse.Namespace, arithmetic: str) -> int:
    """The ZeRO stage in use: that of the options, but at least 1 for float16.

    Without ZeRO, DeepSpeed 0.19's `engine.backward` leaves out the loss scale that its float16 optimizer divides by
    (github.com/deepspeedai/DeepSpeed/pull/8393): gradients would be 65,536 times too small.
    """
    return max(1, options.zero_stage) if arithmetic == "float16" else options.zero_stage


def deepspeed_config(options: argparse.Namespace, world_size: int, arithmetic: str) -> dict:
    """DeepSpeed's configuration for the options.

    A step has as many micro-batches as its sentences need: `engine.step()` is called once, after the last one, and what
    DeepSpeed is told of batch sizes only has to add up.

    bfloat16 runs under autocast on float32 weights: no second copy of the weights, and the model folders hold what was
    trained. float16 has float16 weights with a float32 copy in the optimizer, and a dynamic loss scale.
    """
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.gradient_clipping,
        "prescale_gradients": options.prescale_gradients,
        "wall_clock_breakdown": options.wall_clock_breakdown,
        "zero_optimization": {"stage": zero_stage(options, arithmetic)},
        "zero_allow_untested_optimizer": True,
        # Its throughput timer waits for the device at every step.
        "timers": {"throughput": {"enabled": options.wall_clock_breakdown}},
    }
    if options.steps_per_print is not None:
        config["steps_per_print"] = options.steps_per_print
    if options.gradient_predivide_factor is not None:
        config["gradient_predivide_factor"] = options.gradient_predivide_factor
    if arithmetic == "bfloat16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if arithmetic == "float16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "min_loss_scale": LOWEST_LOSS_SCALE}
    return config


def build_engine(options: argparse.Namespace, model: nn.Module, world_size: int, arithmetic: str):
    """`model` in a DeepSpeed engine with the optimizer of the options; all ranks call this together."""
    if options.steps_per_print is None and not options.wall_clock_breakdown:
        deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed insists on it. If it stayed, a Trainer in this process, or what it starts, would take itself for one of many.
    alone = "LOCAL_RANK" not in os.environ
    if alone:
        os.environ["LOCAL_RANK"] = str(max(0, options.local_rank))
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(options, model),
            config=deepspeed_config(options, world_size, arithmetic),
        )
    finally:
        if alone:
            del os.environ["LOCAL_RANK"]
    return engine
