"""A masked language model in DeepSpeed's engine, as a learner; its optimizer, learning rate and arithmetic."""

import argparse
import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch import nn

from pcfg.common.files import InputError
from pcfg.common.ranks import Ranks
from pretraining.model.bert import MaskedLM
from pretraining.training.batches import GlobalBatch, MicroBatch, Packing, masked_loss
from pretraining.training.learner import Learner, Member, backward_pass
from pretraining.training.sam import ascent
from pretraining.training.state import SafeCheckpointEngine

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
    """Whether the CPU has instructions for products of bfloat16 matrices; without them float32 is 100 times faster."""
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_tile"))


def precision(options: argparse.Namespace, device: torch.device) -> str:
    """The arithmetic of a run: "float32", "bfloat16" or "float16".

    `--fp16` asks for the fast one: float16 on CUDA; on a CPU bfloat16 if it has instructions for it, else float32.
    """
    if options.fp16 and device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    return "float16" if options.fp16 else "bfloat16" if options.bf16 else "float32"


def zero_stage(options: argparse.Namespace, arithmetic: str) -> int:
    """The ZeRO stage in use: that of the options, but at least 1 for float16.

    Without ZeRO, DeepSpeed 0.19's `engine.backward` omits the loss scale by which its float16 optimizer divides
    (github.com/deepspeedai/DeepSpeed/pull/8393): gradients would be 65,536 times too small.
    """
    return max(1, options.zero_stage) if arithmetic == "float16" else options.zero_stage


def build_optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer_type` over the parameters of `model`, with the learning rate `--lr`.

    adam, adamw and sgd are torch's fused ones. adafactor is transformers' with an absolute learning rate, as in
    academic-budget-bert. lamb is You et al. 2020 (algorithm 2, weight decay inside the trust ratio) from `pytorch_optimizer`.
    """
    # Matrices and tables decay, biases and LayerNorm weights do not (Devlin et al. 2019, App. A.2).
    decaying = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (options.adam_beta1, options.adam_beta2)
    match options.optimizer_type:
        case "adamw":
            return torch.optim.AdamW(groups, options.lr, betas, options.adam_eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, options.lr, betas, options.adam_eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, options.lr, options.sgd_momentum, fused=True)
        case "adafactor":
            from transformers.optimization import Adafactor  # takes seconds to import

            return Adafactor(groups, options.lr, relative_step=False, scale_parameter=False)
        case "lamb":
            try:
                from pytorch_optimizer import Lamb
            except ImportError as error:
                raise InputError(f"--optimizer_type lamb: {error}; pip install pytorch_optimizer") from None
            return Lamb(groups, options.lr, betas, weight_decouple=False, eps=options.adam_eps)
    raise InputError(f"--optimizer_type: {options.optimizer_type!r} is unknown")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """lr(p) = peak x warmup(p / W) for p < W, else peak x curve(p), p being finished steps or hours of training so far.

    The schedules are those of academic-budget-bert (Izsak et al. 2021, section 3.3, and its released code).
    warmup(r) = r, r^2 for the exponential curve. curve(p) = (total - p) / (total - W) for "linear",
    decay_rate^((p - W) / decay_step) for "exp", 1 for "const", 1 - (p + 1) / total for "cooldown": a branch's last step has
    rate 0. At p = 0 with a warmup the learning rate is 0, as in the released code and in transformers' schedules.

    >>> schedule = Schedule(peak=1.0, total=100, warmup=20, curve="linear")
    >>> schedule(0), schedule(10), schedule(20), schedule(60), schedule(100), schedule(200)
    (0.0, 0.5, 1.0, 0.5, 0.0, 0.0)
    """

    peak: float  # highest learning rate
    total: float  # end of training, in steps or hours
    warmup: float  # end of the warmup W, in the same unit
    curve: str  # "linear", "exp", "const" or "cooldown"
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
        if self.curve == "cooldown":
            return self.peak * (1 - (position + 1) / self.total)
        return self.peak

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Schedule":
        """The schedule of the command line; positions are hours for `--lr_schedule time`, else steps."""
        total = options.total_training_time if options.lr_schedule == "time" else options.max_steps
        warmup = options.warmup_proportion * total
        if options.lr_schedule in ("constant_step", "wsd"):
            warmup = options.num_warmup_steps
        curve = "const" if options.lr_schedule == "wsd" else options.curve
        return cls(options.lr, total, warmup, curve, options.decay_rate, options.decay_step)


def deepspeed_config(options: argparse.Namespace, world_size: int, arithmetic: str) -> dict:
    """DeepSpeed's configuration for the options.

    A step has as many micro-batches as its sentences need, and calls `engine.step()` once, after the last one. The batch sizes
    given to DeepSpeed only have to be consistent.

    bfloat16 runs under autocast on float32 weights: there is no second copy of the weights, and model folders hold the trained
    ones. float16 has float16 weights with a float32 copy in the optimizer, and a dynamic loss scale.
    """
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.gradient_clipping if zero_stage(options, arithmetic) else 0,
        "prescale_gradients": options.prescale_gradients,
        "wall_clock_breakdown": options.wall_clock_breakdown,
        "zero_optimization": {"stage": zero_stage(options, arithmetic)},
        "zero_allow_untested_optimizer": True,
        # Its throughput timer waits for the device at every step.
        "timers": {"throughput": {"enabled": options.wall_clock_breakdown}},
    }
    for name in ("steps_per_print", "gradient_predivide_factor"):
        if getattr(options, name) is not None:
            config[name] = getattr(options, name)
    if arithmetic == "bfloat16":
        # By default, ZeRO would sum the gradients of linear layers in bfloat16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if arithmetic == "float16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "min_loss_scale": LOWEST_LOSS_SCALE}
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # the sum over micro-batches
    return config


def build_engine(options: argparse.Namespace, model: nn.Module, world_size: int, arithmetic: str) -> deepspeed.DeepSpeedEngine:
    """`model` in a DeepSpeed engine with the optimizer of the options; all ranks call this together."""
    if options.steps_per_print is None and not options.wall_clock_breakdown:
        deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed insists on the variable. If it stayed, a Trainer in this process or in a child would believe to be one of many.
    is_alone = "LOCAL_RANK" not in os.environ
    if is_alone:
        os.environ["LOCAL_RANK"] = str(max(0, options.local_rank))
    try:
        config = deepspeed_config(options, world_size, arithmetic)
        optimizer = build_optimizer(options, model)
        if options.gradient_clipping and not config["gradient_clipping"]:

            def clip(*_: object) -> None:
                # Without ZeRO, DeepSpeed clips parameter by parameter, and the host waits for the norms.
                nn.utils.clip_grad_norm_(list(model.parameters()), options.gradient_clipping)

            optimizer.register_step_pre_hook(clip)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    finally:
        if is_alone:
            del os.environ["LOCAL_RANK"]
    return engine


class EngineLearner(Learner):
    """One model in DeepSpeed's engine, split over any number of ranks."""

    def __init__(self, options: argparse.Namespace, model: MaskedLM, ranks: Ranks, arithmetic: str):
        self.engine = build_engine(options, model, ranks.size, arithmetic)
        self._options = options
        self._ranks = ranks
        self._is_scaled = arithmetic == "float16"
        self.packing = Packing.of(model.config, ranks.device, arithmetic)

    @property
    def loss_scale(self) -> float | None:
        return self.engine.optimizer.loss_scale if self._is_scaled else None

    def models(self) -> list[MaskedLM]:
        return [self.engine.module]

    def accumulate(self, step: int, batches: Sequence[GlobalBatch], members: Sequence[Member]) -> dict[str, torch.Tensor]:
        (batch,) = batches
        (member,) = members
        losses = self._backward(step, batch, member)
        if self._options.sam_rho:
            self.engine.buffered_allreduce_fallback()  # the mean over all ranks, as in `engine.step`
            weights = list(self.engine.module.parameters())
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            with ascent(weights, gradients, self._options.sam_rho):
                self.engine.zero_grad()
                self._backward(step, batch, member)
        return losses

    def _backward(self, step: int, batch: GlobalBatch, member: Member) -> dict[str, torch.Tensor]:
        ranks = self._ranks
        # DeepSpeed averages gradients over ranks; its division by the number of accumulation steps is turned off.
        backward = functools.partial(self.engine.backward, scale_wrt_gas=False)
        # Autocast keeps its casts of the weights until the outermost context ends: one per step, in place of one per
        # micro-batch. This context is not under autocast itself, nor are the backward passes in it.
        with torch.autocast(ranks.device.type, enabled=False):
            losses = backward_pass(
                self._options, self.engine, step, batch, member, self.packing, backward, ranks.rank, ranks.size
            )
        return {name: ranks.sum_on_device(share) for name, share in losses.items()}

    def step(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[MicroBatch]) -> torch.Tensor:
        self.engine.eval()
        loss = torch.zeros(1, dtype=torch.float64, device=self._ranks.device)
        for batch in batches:
            loss += masked_loss(self.engine, batch.to(self._ranks.device))
        self.engine.train()
        return loss

    def save(self, folder: Path) -> None:
        self.engine.checkpoint_engine = SafeCheckpointEngine()
        self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path, files: dict[str, str]) -> None:
        self.engine.checkpoint_engine = SafeCheckpointEngine(files)
        try:
            loaded, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
            raise InputError(
                f"{folder}: DeepSpeed can't load it ({reason}); it is from another version or another model"
            ) from error
        if loaded is None:
            raise InputError(f"{folder}: has no checkpoint of DeepSpeed; take another state")
