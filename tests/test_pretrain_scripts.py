"""The recipes of scripts/: the README's model through DeepSpeed's launcher, and several nodes under SLURM."""

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from pcfg.common.files import read_json
from pretraining.model.checkpoints import load_model
from pretraining.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = (
    "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 32 --train_batch_size 64 "
    "--train_micro_batch_size_per_gpu 16 --print_steps 2 --max_steps 4"
)
# One process a node, at the same time, as srun starts them; each is told its number.
SRUN = """#!/usr/bin/env bash
shift
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    started+=($!)
done
for process in "${started[@]}"; do wait "$process" || exit 1; done
"""


def run(command, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), **environment}
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def losses(job):
    """Of training, then of validation; and how many masks were validated on."""
    records = read_metrics(job / "metrics.jsonl")
    return [record[name] for name in ("loss", "validation_loss", "validation_masks") for record in records if name in record]


def test_the_readme_command_is_the_recipe():
    """The README's command and scripts/pretrain.sh give the same flags, but for names."""

    def flags(text):
        words = shlex.split(text[text.index("--model_type") :].replace("\\\n", " "))
        pairs = re.findall(r"(--\w+)((?: (?!--)\S+)*)", " ".join(words))
        names = ("--dataset_path", "--output_dir", "--job_name", "--project_name")
        return {name: value for name, value in pairs if name not in names}

    readme = (ROOT / "README.md").read_text()
    command = re.search(r"    deepspeed --master_port 32056 run_pretraining.py (.*?)\n\n", readme, re.DOTALL)[0]
    recipe = (ROOT / "scripts/pretrain.sh").read_text().removesuffix(' "$@"\n')
    assert flags(command) == flags(recipe) and len(flags(recipe)) > 30


def test_the_recipe_on_two_ranks(tiny_samples, tmp_path):
    flags = f"{SMALL} --project_name PROJECT"
    done = run(["bash", "scripts/pretrain.sh", tiny_samples, tmp_path, "JOB", *shlex.split(flags)], NUM_RANKS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--fp16 needs CUDA; training in" in done.stdout
    final = tmp_path / "JOB/step0000004"
    assert load_model(final).config.hidden_size == 16
    assert read_json(final / "args.json")["world_size"] == 2
    assert list((tmp_path / "JOB/wandb").glob("offline-run-*"))


def test_two_nodes_under_slurm_train_as_one_process_does(tiny_samples, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\nprintf '127.0.0.1\\nother\\n'\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two", "SLURM_SUBMIT_DIR": str(ROOT)}
    fixed = ["--tokenizer_name", "bert-large-uncased", "--dataset_path", tiny_samples, "--output_dir", tmp_path]
    fixed += shlex.split(f"{SMALL} --lr_schedule step --hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --do_validation")
    done = run(
        ["bash", "scripts/pretrain_slurm.sbatch", *fixed, "--job_name", "two"],
        **slurm,
        PATH=f"{commands}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(tmp_path / "two/step0000004/args.json")["world_size"] == 2
    import run_pretraining

    run_pretraining.main([*map(str, fixed), "--job_name", "one"])
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scripts/pretrain.sh", "data"], "needs the folder of samples"),
        (["scripts/pretrain_slurm.sbatch"], "/nowhere: no run_pretraining.py"),
        (["scripts/reproduce_slurm.sbatch"], "/nowhere: no run_pretraining.py"),
    ],
)
def test_wrong_use_is_one_line(command, message):
    done = run(["bash", *command], SLURM_SUBMIT_DIR="/nowhere")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
