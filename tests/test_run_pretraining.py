import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_pretraining
from pcfg.common.files import InputError, read_json
from pretraining.model import checkpoints
from pretraining.model.checkpoints import load_model, model_folders

ROOT = Path(run_pretraining.__file__).parent
SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 32 --train_micro_batch_size_per_gpu 8 --lr_schedule step "
    "--max_steps 6 --print_steps 1 --save_steps 0,2,4 --do_validation"
)


def command(samples, out, flags, job="job"):
    return ["--dataset_path", str(samples), "--output_dir", str(out), "--job_name", job, *shlex.split(flags)]


def environment():
    """Of a child process: one thread a rank, and the launcher beside the interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}


def assert_same_weights(first, second):
    second = load_model(second).state_dict()
    for name, tensor in load_model(first).state_dict().items():
        assert torch.equal(tensor, second[name]), name


def test_main_trains_saves_and_is_done(tiny_samples, tmp_path, capsys):
    arguments = command(tiny_samples, tmp_path, SMALL + " --project_name PROJECT --report_to none")
    variables = dict(os.environ)
    run_pretraining.main(arguments)
    # What this process starts next, or a Trainer in it, must not take itself for a rank of the run that ended.
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert {name for name in os.environ.keys() - variables.keys() if name in launched} == set()
    job = tmp_path / "job"
    assert not (job / "wandb").exists()
    folders = model_folders(tmp_path)
    assert [folder.name for folder in folders] == ["step0000000", "step0000002", "step0000004", "step0000006"]
    facts = read_json(folders[-1] / "args.json")
    assert (facts["step"], facts["samples_seen"], facts["job_name"], facts["seed"]) == (6, 6 * 32, "job", 42)
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_model(folders[-1]).parameters())
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

    checkpoints.main(["verify", str(job)])
    run_pretraining.main(["--config", str(folders[1] / "args.json"), "--job_name", "again", "--print_steps", "3"])
    assert_same_weights(folders[-1], tmp_path / "again" / "step0000006")
    assert read_json(tmp_path / "again" / "step0000006" / "args.json")["arguments"]["print_steps"] == 3
    with pytest.raises(InputError, match="4 problem.*\\n.*job/step0000000: has the same weights as .*again/step0000000"):
        checkpoints.main(["verify", str(tmp_path)])


def test_without_a_name_the_flags_that_decide_name_the_job(tiny_samples, tmp_path, capsys):
    """Two runs are never in one folder; branches, and a rerun with another flag that decides nothing, are in the run's."""
    flags = f"{SMALL} --lr_schedule wsd --num_warmup_steps 0 --branch_steps 2 --cooldown_steps 1 --current_run_id x "
    words = command(tiny_samples, tmp_path, flags)
    del words[words.index("--job_name") : words.index("--job_name") + 2]
    run_pretraining.main(words)
    (first,) = tmp_path.iterdir()
    assert re.fullmatch("run-[0-9a-f]{8}-x", first.name) and (first / "step0000002-cooled").is_dir()
    assert read_json(first / "step0000006/args.json")["job_name"] == first.name
    capsys.readouterr()
    run_pretraining.main([*words, "--print_steps", "7"])
    assert capsys.readouterr().out == f"complete: {first / 'step0000006'}\n"
    run_pretraining.main(["--config", str(first / "step0000006/args.json"), "--lr", "2e-3"])
    assert len(list(tmp_path.iterdir())) == 2


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


def test_weights_of_a_model_folder_to_begin_with(tiny_samples, tmp_path):
    run_pretraining.main(command(tiny_samples, tmp_path, SMALL, "first"))
    start = tmp_path / "first/step0000004"
    flags = f"{SMALL} --optimizer_type sgd --model_name_or_path {start}"
    run_pretraining.main(command(tiny_samples, tmp_path, flags + " --max_steps 3 --seed 7", "second"))
    assert_same_weights(start, tmp_path / "second/step0000000")
    assert not torch.equal(load_model(start).decoder_bias, load_model(tmp_path / "second/step0000002").decoder_bias)
    facts = read_json(tmp_path / "second/step0000003/args.json")
    assert facts["initial_weights"] == {"sha256": checkpoints.weights_sha256(start)}
    with pytest.raises(InputError, match="another shape than the flags say; give --intermediate_size 32$"):
        run_pretraining.main(command(tiny_samples, tmp_path, flags + " --intermediate_size 64", "third"))
    with pytest.raises(InputError, match="model nowhere: no such folder"):
        run_pretraining.main(command(tiny_samples, tmp_path, SMALL + " --model_name_or_path nowhere", "third"))
    assert not (tmp_path / "third").exists()
