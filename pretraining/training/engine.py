"""DeepSpeed's engine for a masked language model."""

import argparse
import logging

import deepspeed
import torch

from pretraining.training.optimizers import build_optimizer

# The loss scale of float16: DeepSpeed halves it on overflow, down to this.
LOWEST_LOSS_SCALE = 1


def precision(options: argparse.Namespace, device: torch.device) -> str:
    """What the arithmetic is done in: "float32", "bfloat16" or "float16" (on CUDA only, else bfloat16)."""
    if options.fp16 and device.type == "cpu":
        return "bfloat16"
    return "float16" if options.fp16 else "bfloat16" if options.bf16 else "float32"


def zero_stage(options: argparse.Namespace, arithmetic: str) -> int:
    """The ZeRO stage in use: that of the options, but at least 1 for float16.

    Without ZeRO, DeepSpeed 0.19's `engine.backward` leaves out the loss scale that its float16 optimizer divides by
    (github.com/deepspeedai/DeepSpeed/pull/8393): gradients would be 65,536 times too small.
    """
    return max(1, options.zero_stage) if arithmetic == "float16" else options.zero_stage


def deepspeed_config(options: argparse.Namespace, accumulation: int, arithmetic: str) -> dict:
    """DeepSpeed's configuration for the options.

    bfloat16 runs under autocast on float32 weights: no second copy of the weights, and the model folders hold what was
    trained. float16 has float16 weights with a float32 copy in the optimizer, and a dynamic loss scale.
    """
    config = {
        "train_batch_size": options.train_batch_size,
        "train_micro_batch_size_per_gpu": options.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": accumulation,
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


def build_engine(options: argparse.Namespace, model, accumulation: int, arithmetic: str):
    """`model` in a DeepSpeed engine with the optimizer of the options; all ranks call this together."""
    if options.steps_per_print is None and not options.wall_clock_breakdown:
        deepspeed.utils.logger.setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(options, model),
        config=deepspeed_config(options, accumulation, arithmetic),
    )
    return engine
