"""Two ranks compute together what one padded batch gives."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pcfg.common import ranks
from pcfg.common.files import InputError
from pretraining.model.checkpoints import load_model
from pretraining.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# SGD with learning rate 1: weights change by the gradient. 31 sentences of several lengths leave one rank short of one.
ONE_STEP = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --train_batch_size 31 --train_micro_batch_size_per_gpu 3 --lr_schedule constant_step "
    "--num_warmup_steps 0 --curve const --lr 1 --optimizer_type sgd --sgd_momentum 0 --weight_decay 0 --gradient_clipping 0 "
    "--hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --max_steps 1 --save_steps 0 --print_steps 1"
)


def launch(ranks, runs):
    """Do the runs under torchrun, one after another in the same processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    command = [sys.executable, *torchrun, str(Path(__file__).parent / "launched_runs.py"), json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_step_of_two_ranks_is_the_gradient_of_the_padded_batch(tiny_samples, labelled, tmp_path, naive_sam, relative_error):
    """With and without an adversarial term, which is the same for any number of ranks, and with SAM."""
    files = ["--dataset_path", str(tiny_samples), "--output_dir", str(tmp_path)]
    term = f"--adversarial_weight 3 --adversarial_file {labelled} --adversarial_batch_size 20"
    jobs = {f"zero{stage}": (f"--zero_stage {stage}", 0.0, 0.0) for stage in (0, 1, 2)}
    jobs["sam"] = ("--sam_rho 0.5", 0.0, 0.5)
    jobs |= {f"{job}-term": (f"{flags} {term}", 3.0, rho) for job, (flags, _, rho) in jobs.items()}
    launch(2, [[*files, "--job_name", job, *shlex.split(f"{ONE_STEP} {flags}")] for job, (flags, *_) in jobs.items()])
    for job, (_, weight, rho) in jobs.items():
        before = load_model(tmp_path / job / "step0000000").train()
        loss, adversarial = naive_sam(before, batch_size=31, weight=weight, rho=rho)
        (record,) = read_metrics(tmp_path / job / "metrics.jsonl")
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record.get("adversarial_loss") == (pytest.approx(adversarial, rel=1e-5) if weight else None)
        assert relative_error(before, load_model(tmp_path / job / "step0000001")) < 1e-5


@pytest.mark.parametrize(
    ("rank", "is_taken", "message"),
    [
        (0, False, "of 3 ranks, rank1, rank2 did not come within 0.005 minutes; see what they print"),
        (1, False, "of 3 ranks, rank0 did not come"),
        (0, True, "address already in use; is the port in use"),
    ],
)
def test_a_rank_that_died_before_the_others_met_is_named(monkeypatch, rank, is_taken, message):
    monkeypatch.setattr(ranks, "MEETING", 0.3)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)  # by a test before, in this process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        if is_taken:
            free.listen()
        else:
            free.close()
        names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError, match=f"MASTER_PORT {port}: .*{message}"):
            ranks.Ranks()
