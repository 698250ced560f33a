"""CUDA paths on a pretended device (`pretend_cuda`), each run in a process of its own. LONG_TESTS=1 adds variants.

The float32 numbers are those of the CPU bit for bit: the pretended device computes with the CPU's kernels.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcfg.common.files import read_json
from pretraining.model.layers import ATTENTION_FUNCTIONS
from pretraining.training.metrics import read_metrics
from tests.training.conftest import NO_DROPOUT, SMALL, assert_same_weights

VERSION = "2.13"  # of `pretend_cuda`, which must not be imported here
PROGRAM = Path(__file__).parents[1] / "programs_on_cuda.py"
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(VERSION + ".") or torch.version.cuda is not None,
    reason=f"the pretended device is made for the CPU build of torch {VERSION}, not for {torch.__version__}",
)
long = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="a further variant of the same path; LONG_TESTS=1")
PLAIN = "--gradient_clipping 0"


@pytest.fixture(scope="session")
def on_cuda(forks):
    """Runs a part of `programs_on_cuda`; returns what it prints."""

    def run(*arguments):
        command = [forks.executable, PROGRAM, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout}

    return run


@pytest.fixture
def train_on_cuda(on_cuda, tiny_samples, tmp_path):
    """Trains as `train` does, without a record before the end, on the pretended device."""

    def run(flags):
        fixed = ["--dataset_path", tiny_samples, "--output_dir", tmp_path, "--job_name", "cuda"]
        return on_cuda("train", *fixed, *SMALL.split(), *flags.split(), "--print_steps", 100)

    return run


def math_attention(query, key, value, mask, dropout):
    """By the kernel that computes for the pretended device."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def last_record(folder):
    return read_metrics(Path(folder).parent / "metrics.jsonl")[-1]


def check(there, deepspeed_waits):
    """No plan of cuDNN; in a step the host waits so often in DeepSpeed, and once for the loss of the step before it."""
    assert there["plans"] == 0
    *others, (reason, _, queued_since) = there["waits"]
    assert (reason, queued_since > 1000) == ("event", True)
    assert {line.partition(":")[0] for _, line, _ in others} <= {"pretraining/training/engine.py"}
    assert len(others) == deepspeed_waits


@pytest.mark.parametrize(
    ("flags", "deepspeed_waits"),
    [
        (PLAIN, 0),
        pytest.param("--gradient_clipping 1", 0, marks=long),
        pytest.param(f"{PLAIN} --activation_checkpointing", 0, marks=long),
        pytest.param(f"{PLAIN} --zero_stage 1", 3, marks=long),
        pytest.param(f"{PLAIN} --zero_stage 2", 3, marks=long),
        pytest.param(f"{PLAIN} --encoder_ln_mode post-ln --attention eager --layer_norm_type rms_norm", 0, marks=long),
        pytest.param(f"{PLAIN} --sam_rho 0.05", 0, marks=long),
    ],
)
def test_float32_is_that_of_the_cpu_bit_for_bit_with_states_of_each_other(
    train, train_on_cuda, monkeypatch, flags, deepspeed_waits
):
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "sdpa", math_attention)
    flags += " --save_steps 1,5"

    def going_on(folder, step):
        return f"{flags} --load_training_checkpoint {folder.parent / 'training_state'} --load_checkpoint_id step{step:07d}"

    undisturbed = train(f"{flags} --keep_checkpoints 3", job="cpu")
    there = train_on_cuda(f"{going_on(undisturbed, 1)} --keep_checkpoints 2")
    moved = Path(there["folder"])
    assert_same_weights(undisturbed, moved)
    assert_same_weights(undisturbed, train(going_on(moved, 5), job="back"))
    assert "note: float32, the slowest arithmetic of a GPU; --bf16 is" in there["output"]
    check(there, deepspeed_waits)


@pytest.mark.parametrize(
    ("flags", "deepspeed_waits"),
    [
        ("--bf16 --zero_stage 2", 3),
        pytest.param("--bf16", 0, marks=long),
        pytest.param("--bf16 --zero_stage 1 --gradient_clipping 1", 5, marks=long),
        ("--fp16", 4),
        pytest.param("--fp16 --zero_stage 2 --gradient_clipping 1", 6, marks=long),
    ],
)
def test_half_precision_follows_float32(train, train_on_cuda, flags, deepspeed_waits):
    there = train_on_cuda(f"{PLAIN} {NO_DROPOUT} {flags}")
    here = train(f"{PLAIN} {NO_DROPOUT} --print_steps 100", job="cpu")
    assert last_record(there["folder"])["loss"] == pytest.approx(last_record(here)["loss"], abs=0.01)
    assert "--bf16" not in flags or there["unaligned"] == []
    facts = read_json(Path(there["folder"]) / "args.json")
    arithmetic = "bfloat16" if "--bf16" in flags else "float16"
    assert (facts["device"], facts["precision"]) == ("Pretended", arithmetic)
    assert facts["attention"] == "sdpa: flash without padding, efficient with it"
    check(there, deepspeed_waits)


@long
@pytest.mark.parametrize("flags", ["", "--bf16"])
def test_validation_gap_and_adversarial_term(train, train_on_cuda, tiny_rules, labelled, flags):
    flags += f" {PLAIN} {NO_DROPOUT} --do_validation --rule-path {tiny_rules} --gap_sentences 20 --gap_steps 4"
    flags += f" --adversarial_weight 0.1 --adversarial_file {labelled} --adversarial_batch_size 20"
    there = train_on_cuda(flags)
    here = last_record(train(f"{flags} --print_steps 100", job="cpu"))
    record = last_record(there["folder"])
    tolerance = 0.01 if "bf16" in flags else 1e-6  # validation has larger batches there
    assert {"validation_loss", "gap_pairs"} <= record.keys() == here.keys()
    assert [record[name] for name in here if name != "seconds"] == pytest.approx(
        [here[name] for name in here if name != "seconds"], abs=tolerance
    )
    assert there["plans"] == 0
    assert sum(there["validation"]) == 200 and len(there["validation"]) <= 5  # one for each length


@long
def test_measurements_are_those_of_the_cpu_bit_for_bit(on_cuda, tiny_model, tiny_data, tiny_rules):
    there = on_cuda("measure", tiny_model, tiny_data / "test0.txt", tiny_rules)
    for name, expected in there["cpu"].items():
        assert there["cuda"][name] == expected, name


@long
def test_sentences_of_a_language_model(on_cuda):
    there = on_cuda("sample")
    assert there["cuda"] == there["cpu"]
    assert there["bfloat16"] == [64, 23] and there["plans"] == 0
