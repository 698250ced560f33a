import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_pretraining
from pcfg.artefacts import InputError, read_json
from pretraining.model.checkpoints import load_model, model_folders
from pretraining.training.metrics import read_metrics

ROOT = Path(run_pretraining.__file__).parent
SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 32 --train_micro_batch_size_per_gpu 8 --lr_schedule step "
    "--max_steps 6 --print_steps 1 --save_steps 0,2,4 --do_validation"
)
# The command of the README; only sizes are other ones.
README = (
    "--model_type bert-mlm --tokenizer_name bert-large-uncased --hidden_act gelu --hidden_size 16 --num_hidden_layers 2 "
    "--num_attention_heads 2 --intermediate_size 32 --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1 "
    "--encoder_ln_mode pre-ln --lr 5e-4 --train_batch_size 64 --train_micro_batch_size_per_gpu 16 --lr_schedule time "
    "--curve linear --warmup_proportion 0.20 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01 "
    "--adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --print_steps 5 --num_epochs_between_checkpoints 100000 "
    "--job_name JOB --project_name PROJECT --validation_epochs 3 --validation_epochs_begin 1 --validation_epochs_end 1 "
    "--validation_begin_proportion 0.05 --validation_end_proportion 0.01 --validation_micro_batch 16 --deepspeed "
    "--data_loader_type dist --do_validation --fp16 --max_steps 10"
)


def command(samples, out, flags, job="job"):
    return ["--dataset_path", str(samples), "--output_dir", str(out), "--job_name", job, *shlex.split(flags)]


def environment():
    """Of a child process: one thread a rank, and nothing that says it is a rank of this process's group."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path}


def launch(ranks, arguments):
    """Run the script under the `deepspeed` launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(port), *ranks, "run_pretraining.py"]
    result = subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(job):
    return [record["loss"] for record in read_metrics(job / "metrics.jsonl") if "loss" in record]


def assert_same_weights(first, second):
    second = load_model(second).state_dict()
    for name, tensor in load_model(first).state_dict().items():
        assert torch.equal(tensor, second[name]), name


def test_main_trains_saves_and_is_done(tiny_samples, tmp_path, capsys):
    arguments = command(tiny_samples, tmp_path, SMALL + " --project_name PROJECT --report_to none")
    run_pretraining.main(arguments)
    job = tmp_path / "job"
    assert not (job / "wandb").exists()
    folders = model_folders(tmp_path)
    assert [folder.name for folder in folders] == ["step0000000", "step0000002", "step0000004", "step0000006"]
    facts = read_json(folders[-1] / "args.json")
    assert (facts["step"], facts["samples_seen"], facts["job_name"], facts["seed"]) == (6, 6 * 32, "job", 42)
    assert facts["number_of_parameters"] == load_model(folders[-1]).number_of_parameters()
    assert facts["arguments"]["save_steps"] == [0, 2, 4] and facts["final"]
    records = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 6]
    assert {"step", "samples", "loss", "lr", "sentences_per_second", "seconds"} <= records[0].keys()
    assert "validation_loss" in records[-1]
    assert not torch.equal(load_model(folders[0]).decoder_bias, load_model(folders[1]).decoder_bias)

    before = {path: path.stat().st_mtime_ns for path in job.rglob("*")}
    capsys.readouterr()
    run_pretraining.main(arguments)
    assert capsys.readouterr().out == f"complete: {folders[-1]}\n"
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*")} == before


def test_layernorm_embedding_changes_nothing_and_says_so(tiny_samples, tmp_path, capsys):
    run_pretraining.main(command(tiny_samples, tmp_path, SMALL + " --max_steps 2", "without"))
    run_pretraining.main(command(tiny_samples, tmp_path, SMALL + " --max_steps 2 --layernorm_embedding", "with"))
    assert "--layernorm_embedding: changes nothing" in capsys.readouterr().out
    assert_same_weights(tmp_path / "without/step0000002", tmp_path / "with/step0000002")


def test_an_unknown_tokenizer_fails_at_once(tiny_samples, tmp_path):
    start = time.monotonic()
    with pytest.raises(InputError, match="bert-base-nowhere"):
        run_pretraining.main(command(tiny_samples, tmp_path, SMALL + " --tokenizer_name bert-base-nowhere"))
    assert time.monotonic() - start < 20


def test_errors_exit_with_2_and_without_a_traceback(tmp_path):
    script = [sys.executable, "run_pretraining.py", *command(tmp_path / "nowhere", tmp_path, SMALL)]
    result = subprocess.run(script, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "nowhere: no such folder" in result.stderr and "Traceback" not in result.stderr


def test_the_readme_command(tiny_samples, tmp_path):
    output = launch([], command(tiny_samples, tmp_path, README, "JOB"))
    assert "--fp16 needs CUDA" in output and "bfloat16" in output
    assert load_model(tmp_path / "JOB/step0000010").config.hidden_size == 16
    assert list((tmp_path / "JOB/wandb").glob("offline-run-*"))


def test_two_ranks_train_as_one_does(tiny_samples, tmp_path):
    flags = SMALL + " --hidden_dropout_prob 0 --attention_probs_dropout_prob 0"
    launch(["--num_gpus", "2"], command(tiny_samples, tmp_path, flags, "two"))
    run_pretraining.main(command(tiny_samples, tmp_path, flags, "one"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (read_metrics(tmp_path / job / "metrics.jsonl")[-1] for job in ("one", "two"))
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-5)
    assert two["validation_masks"] == one["validation_masks"]
    assert read_json(tmp_path / "two/step0000006/args.json")["world_size"] == 2


def test_kill_and_rerun(tiny_samples, tmp_path):
    flags = SMALL + " --max_steps 200 --save_steps 20,100 --print_steps 100"
    arguments = command(tiny_samples, tmp_path, flags, "killed")
    process = subprocess.Popen(
        [sys.executable, "run_pretraining.py", *arguments], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed/training_state/latest").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed/step0000200").exists()
    run_pretraining.main(arguments)
    run_pretraining.main(command(tiny_samples, tmp_path, flags, "undisturbed"))
    assert_same_weights(tmp_path / "killed/step0000200", tmp_path / "undisturbed/step0000200")
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
