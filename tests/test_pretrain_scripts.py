"""The recipes of scripts/: the README's model through DeepSpeed's launcher, and several nodes under SLURM."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
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
# The parts of SLURM that the scripts call. srun starts its tasks at once; if it gets SIGTERM, it kills them as SLURM's does.
# scancel asks the tasks of all steps. All note how they were called.
SLURM = {
    "srun": """#!/usr/bin/env bash
echo "srun $*" >>"$NOTES/calls"
trap 'touch "$NOTES/killed"; kill -KILL "${started[@]}"' TERM
for word in "$@"; do [[ $word = --ntasks=* ]] && number=${word#*=}; [[ $word = --ntasks-per-node=* ]] && local=${word#*=}; done
while [[ $1 = --* ]]; do shift; done
for ((rank = 0; rank < number; rank++)); do
    SLURM_NTASKS=$number SLURM_PROCID=$rank SLURM_LOCALID=$((rank % local)) "$@" &
    started+=($!)
    echo $! >>"$NOTES/tasks"
done
for process in "${started[@]}"; do wait "$process" || code=$?; done
exit "${code:-0}"
""",
    "scancel": """#!/usr/bin/env bash
echo "scancel $*" >>"$NOTES/calls"
xargs kill -TERM <"$NOTES/tasks"
""",
    "scontrol": """#!/usr/bin/env bash
echo "scontrol $*" >>"$NOTES/calls"
[ "$2" != hostnames ] || printf '127.0.0.1\\nother\\n'
[ "$2" != job ] || echo "JobId=7 JobState=$STATE"
""",
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two nodes without GPUs, with `SLURM`; calls are noted in NOTES/calls."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two", "SLURM_SUBMIT_DIR": str(ROOT)}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**job, "SLURM_CPUS_ON_NODE": "8", "NOTES": str(tmp_path), "PATH": path}


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


def test_two_nodes_under_slurm_train_as_one_process_does(slurm, tiny_samples, tmp_path):
    fixed = ["--tokenizer_name", "bert-large-uncased", "--dataset_path", tiny_samples, "--output_dir", tmp_path]
    fixed += shlex.split(f"{SMALL} --lr_schedule step --hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --do_validation")
    done = run(["bash", "scripts/pretrain_slurm.sbatch", *fixed, "--job_name", "two"], **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(tmp_path / "two/step0000004/args.json")["world_size"] == 2
    import run_pretraining

    run_pretraining.main([*map(str, fixed), "--job_name", "one"])
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


# A run that says after SIGTERM that it has saved its state, as run_pretraining.py does on rank 0, unless it could not.
RANK = """#!/usr/bin/env bash
[ "$STATE" != refused ] || exit 2
stop() {
    [ "$RANK" != 0 ] || [ "$STATE" = unsaved ] || echo "SIGTERM at step 7; training state: OUT/seed3/training_state/step0000007"
    exit 143
}
trap stop TERM
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT ${OMP_NUM_THREADS-unset}" >"$NOTES/rank$RANK"
while :; do sleep 0.05; done
"""
# One training, started by the words of --launcher; as the runner does, it passes SIGTERM on.
STUDIES = """#!/usr/bin/env bash
while [ "$1" != --launcher ]; do shift; done
echo "[  1/121] text: done"
$2 run_pretraining.py --output_dir studies/models --job_name "studies/models/large" & child=$!
trap 'kill -TERM "$child"; wait "$child"; exit 143' TERM
wait
"""


@pytest.mark.parametrize(
    ("name", "state", "requeue", "code"),
    [
        ("pretrain", "RUNNING", "1", 0),
        ("pretrain", "RUNNING", "0", 0),
        ("pretrain", "CANCELLED", "1", 0),
        ("pretrain", "unsaved", "1", 143),
        ("pretrain", "refused", "1", 2),
        ("reproduce", "RUNNING", "1", 0),
    ],
)
def test_a_slurm_job_passes_sigterm_to_its_ranks_and_ends_as_they_do(slurm, tmp_path, name, state, requeue, code):
    """The whole process group of the batch file gets it, srun not: it would kill the ranks before they have saved."""
    root = tmp_path / "project with a space" if name == "pretrain" else tmp_path / "project"
    (root / ".venv/bin").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "run_pretraining.py").touch()
    for path, text in ((root / ".venv/bin/python", RANK), (root / "scripts/reproduce_all.sh", STUDIES)):
        path.write_text(text)
        path.chmod(0o755)
    flags = ["--output_dir", "OUT", "--job_name=seed%a", "OUT/seed%a"] if name == "pretrain" else ["--out", "studies"]
    slurm |= {"SLURM_SUBMIT_DIR": str(root), "STATE": state, "REQUEUE": requeue, "SLURM_GPUS_ON_NODE": "2"}
    slurm["SLURM_ARRAY_TASK_ID"] = "3"
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MASTER_PORT")} | slurm
    command = ["bash", f"scripts/{name}_slurm.sbatch", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as job:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("rank?"))) < 4 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if state != "refused":
            os.killpg(job.pid, signal.SIGTERM)
        printed, _ = job.communicate(timeout=30)
    assert job.returncode == code, printed
    calls = (tmp_path / "calls").read_text().splitlines()
    script = f"- {root}/.venv/bin/python {root}/run_pretraining.py"
    srun = next(call for call in calls if call.startswith("srun"))
    assert srun.startswith("srun --kill-on-bad-exit=1 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=4 --gpus-per-node=2")
    if state == "refused":
        return
    assert script in srun and "scancel --signal=TERM 7" in calls
    assert not (tmp_path / "killed").exists()
    ranks = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert ranks == [f"{rank} {rank % 2} 4 2 127.0.0.1 20007 unset\n" for rank in range(4)]
    assert name != "pretrain" or srun.endswith("--output_dir OUT --job_name=seed3 OUT/seed3")
    is_requeued = (state, requeue) == ("RUNNING", "1")
    assert ("scontrol requeue 7" in calls) == is_requeued and ("; requeued" in printed) == is_requeued
    assert ("go on: the same sbatch" in printed) == (code == 0 and not is_requeued)
    assert ("SIGTERM at step 7" in printed) == (state != "unsaved")


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


# The parts of ssh and of DeepSpeed that scripts/pretrain.sh calls.
HOSTS = {
    "bin/pdsh": "",
    "bin/ssh": 'for host; do case $host in off) exit 255 ;; bare) exit 1 ;; esac; done; echo "ssh $*" >>"$NOTES/calls"',
    ".venv/bin/python": "",
    ".venv/bin/pip": "",
    ".venv/bin/deepspeed": """printf '%s\\n' "$@" >"$NOTES/words"
cp "$DS_ENV_FILE" "$NOTES/environment"
while [ "$1" != --enable_each_rank_log ]; do shift; done
eval "logs=$2"
echo "step 7" >"$logs/1_rank0.log"
[ "$CODE" = 0 ] || echo "run_pretraining.py: error: rank0 did not come" >"$logs/2_rank1.log"
sleep 0.7
exit "$CODE"
""",
}


@pytest.fixture
def hosts(tmp_path):
    """Runs scripts/pretrain.sh in a copy of the project with `HOSTS`, on the machines of a hostfile with some lines."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements.txt").touch()
    for name, text in HOSTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)

    def start(*lines, **environment):
        (tmp_path / "hosts").write_text("\n".join([*lines, ""]))
        own = {"HOSTFILE": "hosts", "NOTES": str(tmp_path), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", "scripts/pretrain.sh", "my samples", "my models", "JOB", "--seed", "5"]
        environment = {**os.environ, **own, "CODE": "0", **environment}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return start


def test_a_hostfile_starts_ranks_with_their_environment_and_logs(hosts, tmp_path):
    secret = {"WANDB_API_KEY": "secret", "HF_TOKEN": "secret"}
    done = hosts(
        "# all", "a slots=2", "b slots=2", OMP_NUM_THREADS="3", GLOO_SOCKET_IFNAME="eth0", MASTER_ADDR="10.0.0.1", **secret
    )
    assert done.returncode == 0 and "step 7" in done.stdout, done.stderr
    words = (tmp_path / "words").read_text().splitlines()
    (logs,) = (tmp_path / "my models/JOB/logs").iterdir()
    expected = ["--hostfile", "hosts", "--enable_each_rank_log", str(logs).replace(" ", "\\ "), "--master_addr", "10.0.0.1"]
    assert words[2 : len(expected) + 3] == [*expected, str(tmp_path / "run_pretraining.py")]
    assert words[-2:] == ["--seed", "5"] and {"my samples", "my models"} < set(words)
    given = (tmp_path / "environment").read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "GLOO_SOCKET_IFNAME=eth0", "WANDB_MODE=offline", "HF_HUB_OFFLINE=1"} <= set(given)
    assert not [line for line in given if "secret" in line or "API" in line]
    asked = (tmp_path / "calls").read_text().splitlines()
    assert [re.search(" (.) test -d", line)[1] for line in asked] == ["a", "b"]
    assert all("BatchMode=yes" in line and "ConnectTimeout=10" in line and r"/my\ samples " in line for line in asked)


def test_the_first_error_of_any_rank_ends_the_output(hosts):
    done = hosts("a", "b", CODE="2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: a rank failed: run_pretraining.py: error: rank0 did not come")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "off slots=4"], "HOSTFILE hosts: off: ssh fails; try: ssh -oBatchMode=yes"),
        (["bare", "a"], "HOSTFILE hosts: bare: lacks "),
    ],
)
def test_a_machine_that_can_not_start_ranks_is_refused_at_once(hosts, tmp_path, lines, message):
    done = hosts(*lines)
    assert done.returncode == 2 and done.stderr.startswith(f"pretrain.sh: error: {message}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "words").exists() and not (tmp_path / "my models").exists()


def test_requirements_are_installed_once_however_their_path_is_written(tmp_path):
    """A changed file is installed again; Python and pip are substitutes."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("python", "pip"):
        (tmp_path / ".venv/bin" / name).write_text(f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/calls\n')
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    files = tmp_path / "requirements.txt", tmp_path / "tests/requirements.txt"
    for file in files:
        file.write_text("torch\n")
    for words in ([], ["requirements.txt"], ["tests/../requirements.txt", files[1]], [*files]):
        done = subprocess.run(["bash", "scripts/setup.sh", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "" and len((tmp_path / "calls").read_text().splitlines()) == 2
    files[0].write_text("torch==2\n")
    subprocess.run(["bash", tmp_path / "scripts/setup.sh"], cwd="/", capture_output=True, check=True)
    assert (tmp_path / "calls").read_text().splitlines()[2:] == [
        f"-m pip install --quiet --disable-pip-version-check -r {files[0]}"
    ]
