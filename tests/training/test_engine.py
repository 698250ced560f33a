import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pretraining.data.samples import read_samples
from pretraining.training import arguments as command_line
from pretraining.training.batches import Packing, masked_loss, micro_batch
from pretraining.training.engine import build_engine, precision, start_ranks, zero_stage
from pretraining.training.pretrain import build_model

FLAGS = (
    "--dataset_path data --tokenizer_name t --output_dir out --hidden_size 16 --num_hidden_layers 1 "
    "--num_attention_heads 2 --intermediate_size 32 --train_batch_size 64 --train_micro_batch_size_per_gpu 64 "
    "--gradient_clipping 0 --optimizer_type sgd --sgd_momentum 0 --lr 0.1 --weight_decay 0 --hidden_dropout_prob 0 "
    "--attention_probs_dropout_prob 0"
)


def parse(flags=""):
    return command_line.build_parser("").parse_args([*FLAGS.split(), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("", "cpu", "float32"),
        ("--bf16", "cpu", "bfloat16"),
        ("--fp16", "cuda", "float16"),
        ("--bf16", "cuda", "bfloat16"),
    ],
)
def test_precision(flags, device, expected):
    assert precision(parse(flags), torch.device(device)) == expected


@pytest.mark.parametrize(
    ("instructions", "expected"), [({"amx_tile": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({}, "float32")]
)
def test_fp16_on_a_cpu_is_what_it_is_fast_at(monkeypatch, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **instructions})
    assert precision(parse("--fp16"), torch.device("cpu")) == expected


@pytest.fixture
def cpu_takes_float16(monkeypatch):
    """DeepSpeed asks the CPU for float16 instructions; slow ones are enough here."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: [torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("cpu_takes_float16")
def test_one_step_of_sgd_is_the_gradient_in_every_precision(tiny_samples, arithmetic):
    options = parse("--fp16" if arithmetic == "float16" else "")
    start_ranks(options)
    samples = read_samples(tiny_samples / "test_shard_0.hdf5")
    batch = micro_batch(samples, np.arange(64), Packing())
    config = command_line.model_config(options, samples.attributes["vocab_size"], 10)
    exact, model = build_model(config, seed=0), build_model(config, seed=0)
    (masked_loss(exact, batch) / len(batch.labels)).backward()

    engine = build_engine(options, model, 1, arithmetic)
    before = {name: parameter.detach().float().clone() for name, parameter in engine.module.named_parameters()}
    engine.backward(masked_loss(engine, batch) / len(batch.labels), scale_wrt_gas=False)
    engine.step()
    change = engine.module.decoder_bias.float() - before["decoder_bias"]
    torch.testing.assert_close(change, -0.1 * exact.decoder_bias.grad, rtol=0.02, atol=1e-4)


def test_float16_is_never_without_zero():
    assert zero_stage(parse(), "float16") == 1
    assert zero_stage(parse("--zero_stage 2"), "float16") == 2
    assert zero_stage(parse(), "bfloat16") == 0


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.usefixtures("cpu_takes_float16")
def test_float16_adds_up_micro_batches_in_float32(stage):
    options = parse(f"--fp16 --zero_stage {stage}")
    start_ranks(options)
    engine = build_engine(options, build_model(command_line.model_config(options, 20, 10), seed=0), 1, "float16")
    bias = engine.module.decoder_bias
    # Next to 0.25, float16 has no number closer than 0.00024: each small part alone would be lost.
    for part in [0.25, *[0.0001] * 100]:
        engine.backward(part * bias.float().sum(), scale_wrt_gas=False)
    engine.step()
    torch.testing.assert_close(bias.float(), torch.full_like(bias, -0.1 * 0.26).float(), rtol=0.005, atol=0)
