"""Parts of the project on the pretended CUDA device, in a process of its own; the last line of the output is a JSON object.

python tests/programs_on_cuda.py train FLAGS ...       pre-training; the host's waits in its third step
python tests/programs_on_cuda.py measure MODEL TEXT    traces, loss and features of a model, on the CPU and there
python tests/programs_on_cuda.py sample                sentences of a language model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import collections
import copy
import json

import torch

from tests import pretend_cuda
from tests.pretend_cuda import PretendCuda

STEP = 3  # whose waits are counted


def train(flags):
    from pretraining.evaluation.loss import gap_meter
    from pretraining.training import arguments, batches
    from pretraining.training.engine import EngineLearner
    from pretraining.training.pretrain import pretrain
    from pretraining.training.trainer import Trainer
    from tests.pretend_accelerator import deepspeed_on

    follow_schedule, record, validation_loss = Trainer.follow_schedule, Trainer.record, EngineLearner.validation_loss
    step = {}

    def begin(self):
        follow_schedule(self)
        if self.progress.step == STEP - 1:
            step["from"] = len(device.waits)

    def end(self, losses):
        if self.progress.step == STEP:
            step["waits"] = device.waits[step["from"] :]
        record(self, losses)

    def validate(self, parts):
        parts = list(parts)
        step["validation"] = [sum(number for number, *_ in part.blocks) for part in parts]
        return validation_loss(self, parts)

    batches.BLOCK_COST["cuda"] = batches.BLOCK_COST["cpu"]  # the micro-batches of a CPU
    Trainer.follow_schedule, Trainer.record, EngineLearner.validation_loss = begin, end, validate
    options = arguments.build_parser("").parse_args(flags)
    arguments.check(options)
    with PretendCuda() as device, deepspeed_on(device):
        folder = pretrain(options, gap_meter)
    return {"folder": str(folder), **step, **recorded(device)}


def recorded(device):
    return {"attention": device.attention, "plans": len(device.plans), "unaligned": sorted(device.unaligned)}


def measure(folder, text, rules):
    from pcfg.common.text import read_texts
    from pcfg.grammar import Grammar
    from pcfg.lookup import LookupTable
    from pretraining.data.contexts import from_texts, table_columns
    from pretraining.evaluation.features import conditional_features, hidden_features
    from pretraining.evaluation.hessian import Sampling, estimate_trace
    from pretraining.evaluation.inputs import Truth
    from pretraining.evaluation.loss import context_losses
    from pretraining.model.checkpoints import load_model, load_vocabulary

    model = load_model(Path(folder), "cpu", "eager")
    vocabulary = load_vocabulary(folder)
    texts = read_texts(Path(text))[:24]
    table = LookupTable.compute(Grammar.read(rules), texts, rules)
    columns = table_columns(table, vocabulary, rules)
    contexts = from_texts(texts, vocabulary, text, table)
    truth = Truth(table, columns)

    def trace(name, model):
        return estimate_trace(name, model, contexts, Sampling(nsamples=24, block_size=8), truth).values

    measurements = {
        "fisher": lambda model: trace("fisher", model),
        "hutchinson": lambda model: trace("hutchinson", model),
        "loss": lambda model: context_losses(model, contexts, truth),
        "hidden": lambda model: hidden_features(model, contexts, 10),
        "conditional": lambda model: conditional_features(model, contexts, 8),
    }
    expected = {name: measurement(copy.deepcopy(model)) for name, measurement in measurements.items()}
    with PretendCuda() as device:
        moved = copy.deepcopy(model).to("cuda")
        found = {name: measurement(moved) for name, measurement in measurements.items()}
    as_numbers = torch.utils._pytree.tree_map(lambda value: torch.as_tensor(value).tolist(), [expected, found])
    return {"cpu": as_numbers[0], "cuda": as_numbers[1], **recorded(device)}


def sample():
    import numpy as np
    from transformers import OPTConfig, OPTForCausalLM

    from pretraining.sources.opt.causal_lm import RestrictedLM
    from pretraining.sources.opt.source import sample

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 1, "word_embed_proj_dim": 64}
    model = OPTForCausalLM(OPTConfig(vocab_size=120, max_position_embeddings=64, **shape)).eval().requires_grad_(False)
    language = (list(range(4, 104)), 2, 3, 23)
    uniform = np.random.default_rng(0).random((64, 23))
    expected = sample(RestrictedLM(model, *language), uniform).tolist()
    with PretendCuda() as device:
        found = sample(RestrictedLM(copy.deepcopy(model).to("cuda"), *language), uniform).tolist()
        half = sample(RestrictedLM(copy.deepcopy(model).to("cuda", torch.bfloat16), *language), uniform)
    return {"cpu": expected, "cuda": found, "bfloat16": half.shape, **recorded(device)}


if __name__ == "__main__":
    pretend_cuda.install()
    name, *arguments = sys.argv[1:]
    result = train(arguments) if name == "train" else globals()[name](*arguments)
    print(json.dumps(result, default=lambda value: collections.Counter(value)))
