"""Optimizers by name. Each is a maintained library's."""

import argparse

import torch
from torch import nn

from pcfg.common.files import InputError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and tables decay, biases and LayerNorm weights don't (Devlin et al. 2019, appendix A.2).

    Returns:
        Two of torch's parameter groups.
    """
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer_type` over the parameters of `model`, with the learning rate `--lr`.

    adam, adamw and sgd are torch's fused ones; adafactor is transformers' with an absolute learning rate, as in
    academic-budget-bert; lamb is You et al. 2020 (algorithm 2, weight decay inside the trust ratio) from `pytorch_optimizer`.

    Raises:
        InputError: the library of the optimizer is missing.
    """
    groups = parameter_groups(model, options.weight_decay)
    betas, eps = (options.adam_beta1, options.adam_beta2), options.adam_eps
    match options.optimizer_type:
        case "adamw":
            return torch.optim.AdamW(groups, options.lr, betas, eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, options.lr, betas, eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, options.lr, options.sgd_momentum, fused=True)
        case "adafactor":
            from transformers.optimization import Adafactor  # seconds to import: only where it is asked for

            return Adafactor(groups, options.lr, relative_step=False, scale_parameter=False)
        case "lamb":
            try:
                from pytorch_optimizer import Lamb
            except ImportError as error:
                raise InputError(f"--optimizer_type lamb: {error}; pip install pytorch_optimizer") from None
            return Lamb(groups, options.lr, betas, weight_decouple=False, eps=eps)
    raise InputError(f"--optimizer_type: {options.optimizer_type!r} is unknown")
