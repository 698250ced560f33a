"""Runs that are killed at any moment, and go on as if nothing had happened; ranks that become more and fewer.

The ranks are forked from one process that has imported everything, so that kills meet the work and not the imports, and a
run takes a fraction of a second. LONG_TESTS=1 makes the longer version.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import run_pretraining
from pcfg.common.files import read_json, sha256
from pretraining.training.metrics import read_metrics

KILLS = 300 if os.environ.get("LONG_TESTS") else 18
KINDS = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2)]
SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 16 --train_micro_batch_size_per_gpu 8 --lr_schedule step "
    "--max_steps 12 --print_steps 1 --save_steps 0,2,4,9 --max_steps_per_epoch 7 --do_validation --validation_epochs 1 "
    "--validation_micro_batch 200"
)
BRANCHES = " --lr_schedule wsd --num_warmup_steps 2 --branch_steps 4,12 --cooldown_steps 6 --cooldown_batch_size 24"

# Reads jobs, a JSON line each: ranks, arguments, and when to kill: "event" k: rank 0, before its k-th change of the file
# system under the run's folder; "time" s: all ranks after s seconds; "term" n: SIGTERM for all ranks, twice within a
# millisecond as SLURM and torchrun do, when step n is recorded; null: not at all. Answers with the ranks' exit statuses, the
# number of those changes and the seconds.
FORKS = r"""
import importlib, json, os, signal, socket, sys, time
import torch
import run_pretraining
from pcfg.common.cli import Interrupted
from pcfg.common.files import InputError

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")


def count_changes(folder, answer, kill):
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES or event in CHANGES:
            # Deleting and syncing go by names inside an open folder.
            path = arguments[0] if isinstance(arguments[0], str) else ""
            if path.startswith(folder) or event != "open" and "/" not in path:
                if kill is not None and kill[0] == "event" and count == kill[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                os.pwrite(answer, count.to_bytes(4, "little"), 0)

    sys.addaudithook(hook)


def rank(number, job, port, answer, errors):
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    if job["ranks"] > 1:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(job["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if number == 0:
        count_changes(job["folder"], answer, job["kill"])
    code = 1
    try:
        run_pretraining.main(job["arguments"])
        code = 0
    except InputError as error:
        print("InputError:", error, flush=True)
        code = 2
    except Interrupted as interrupted:
        code = 128 + interrupted.number
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        if job.get("modules"):
            with open(job["modules"], "w") as file:
                json.dump(sorted(sys.modules), file)
        sys.stdout.flush()
        os._exit(code)


def run(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = os.memfd_create("changes")
    errors = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    begun, children = time.monotonic(), []
    for number in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            rank(number, job, port, answer, errors)
        children.append(child)
    if job["kill"] is not None and job["kill"][0] == "time":
        time.sleep(job["kill"][1])
        for child in children:
            os.kill(child, signal.SIGKILL)
    if job["kill"] is not None and job["kill"][0] == "term":
        while f"step {job['kill'][1]}/" not in open(job["log"]).read():
            time.sleep(0.001)
        for child in 2 * children:
            os.kill(child, signal.SIGTERM)
            time.sleep(0.0003)
    statuses = {}
    while len(statuses) < len(children):
        child, status = os.waitpid(-1, 0)
        statuses[child] = os.waitstatus_to_exitcode(status)
        if status:  # as a launcher does: one that ends badly ends all
            for other in children:
                if other not in statuses:
                    os.kill(other, signal.SIGKILL)
    os.close(errors)
    changes = int.from_bytes(os.pread(answer, 4, 0), "little")
    os.close(answer)
    return [[statuses[child] for child in children], changes, time.monotonic() - begun]


for line in sys.stdin:
    job = json.loads(line)
    result = run(job)
    if job.get("modules"):  # what a run imports on its way is imported here, once for all runs to come
        with open(job["modules"]) as file:
            for name in json.load(file):
                try:
                    importlib.import_module(name)
                except Exception:
                    pass
    print(json.dumps(result), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def fork(tiny_samples, tmp_path_factory):
    """Runs the pre-training with some ranks; returns their exit codes, the changes on the disk and the seconds."""
    place = tmp_path_factory.mktemp("forks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    root = Path(run_pretraining.__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    with subprocess.Popen(command, cwd=root, env=environment, text=True, bufsize=1, **pipes) as forks:

        def run(job, flags, ranks=1, kill=None, modules=None):
            fixed = ["--dataset_path", str(tiny_samples), "--output_dir", str(job.parent), "--job_name", job.name]
            spec = {"ranks": ranks, "arguments": [*fixed, *shlex.split(f"{SMALL} {flags}")], "folder": str(job)}
            spec |= {"kill": kill, "modules": modules, "log": str(job.with_name(job.name + ".log"))}
            print(json.dumps(spec), file=forks.stdin, flush=True)
            while not (line := forks.stderr.readline()).startswith("[["):
                assert line, "the process that forks has ended"
            return json.loads(line)

        for stage in (0, 1):
            run(place / f"stage{stage}", f"--zero_stage {stage} --max_steps 1", modules=str(place / "modules.json"))
        yield run
        forks.stdin.close()


def log(job):
    return job.with_name(job.name + ".log").read_text()


def record(job):
    """All that must not depend on kills: each model folder's weights, and the losses and learning rates of the log."""
    weights = {path.parent.name: sha256(path) for path in sorted(job.glob("step*/model.safetensors"))}
    names = ("step", "loss", "lr", "validation_loss", "adversarial_loss", "branch")
    return weights, [tuple(map(r.get, names)) for r in read_metrics(job / "metrics.jsonl")]


def moments(number, rng):
    """Moments to kill at, as parts of a run: spread over all of it, in a random order."""
    return rng.permutation((np.arange(number) + rng.random(number)) / number)


def term(labelled):
    return f" --adversarial_weight 1 --adversarial_file {labelled} --adversarial_batch_size 20"


def test_killed_at_any_moment_and_run_again(fork, labelled, tmp_path):
    """SIGKILL between any two changes of the disk (so inside saves), and at random moments; the reruns are killed as well.

    Every job is killed up to three times before it may finish. Weights, losses and learning rates are then bitwise those of
    the undisturbed run. Those with ZeRO 2 have an adversarial term, those with ZeRO 1 branches.
    """
    rng, each = np.random.default_rng(5), -(-KILLS // len(KINDS))
    for ranks, stage in KINDS:
        kind = f"ranks{ranks}-zero{stage}"
        flags = f"--zero_stage {stage}" + term(labelled) * (stage == 2) + BRANCHES * (stage == 1)
        codes, changes, seconds = fork(tmp_path / kind, flags, ranks)
        assert codes == [0] * ranks, log(tmp_path / kind)
        expected = record(tmp_path / kind)
        assert len(expected[0]) == 5 + 2 * (stage == 1)
        assert [step for step, loss, *_, branch in expected[1] if loss is not None and branch is None] == list(range(1, 13))
        assert sum(branch == 12 for *_, branch in expected[1]) >= 6 * (stage == 1)
        by_time = each // 3
        pending = [("time", part) for part in moments(by_time, rng)] + [
            ("event", part) for part in moments(each - by_time, rng)
        ]
        jobs = 0
        while pending:
            job, attempts = tmp_path / f"{kind}-{jobs}", 0
            while pending and attempts < 3:
                how, part = pending[-1]
                codes, *_ = fork(job, flags, ranks, (how, int(part * changes) if how == "event" else part * seconds))
                if codes == [0] * ranks:  # done before it was killed: there was less left to do, or the first run had been slow
                    seconds *= 0.9
                    break
                assert -signal.SIGKILL in codes, log(job)
                pending.pop()
                attempts += 1
            codes, *_ = fork(job, flags, ranks)
            assert codes == [0] * ranks, log(job)
            assert record(job) == expected
            assert not [path for path in job.rglob(".*") if path.is_dir()]
            assert len([path.name for path in (job / "training_state").iterdir() if path.is_dir()]) == 2
            jobs += 1


def test_two_ranks_that_get_sigterm_twice_save_the_step_that_they_reached(fork, tmp_path):
    assert fork(tmp_path / "undisturbed", BRANCHES, 2)[0] == [0, 0]
    expected = record(tmp_path / "undisturbed")
    for moment in range(40 if KILLS > 100 else 2):
        job, step = tmp_path / f"job{moment}", (3, 8, 1, 5, 10)[moment % 5]
        codes, *_ = fork(job, BRANCHES, 2, ("term", step))
        assert 143 in codes and set(codes) <= {143, -signal.SIGKILL}, log(job)  # the first to end ends the other
        (state,) = re.findall("SIGTERM at step .*; training state: (.*)", log(job))
        assert int(state[-7:]) >= step or "branch" in state
        assert fork(job, BRANCHES, 2)[0] == [0, 0], log(job)
        assert f"going on from {state.partition('/branch')[0]}" in log(job)
        assert record(job) == expected


def test_a_state_is_saved_after_some_minutes(fork, tmp_path):
    """Every step is longer than these: states begin in the middle of an epoch, where a kill finds the newest."""
    assert fork(tmp_path / "undisturbed", "--save_steps 12")[0] == [0]
    flags = "--save_steps 12 --validation_epochs 100 --validation_epochs_begin 100 --save_state_minutes 1e-9"
    codes, *_ = fork(tmp_path / "job", flags, kill=("term", 4))
    (state,) = re.findall("SIGTERM at step .*; training state: (.*)", log(tmp_path / "job"))
    others = sorted(folder.name for folder in Path(state).parent.glob("step*"))
    assert codes == [143] and others == [f"step{int(state[-7:]) - 1:07d}", state[-11:]]
    assert fork(tmp_path / "job", flags)[0] == [0] and f"going on from {state}" in log(tmp_path / "job")
    assert record(tmp_path / "job")[0] == record(tmp_path / "undisturbed")[0]


def test_one_rank_two_ranks_and_one_again(fork, labelled, tmp_path):
    """With ZeRO 0 and without dropout the samples of every step are the same, and so are the losses."""
    flags = "--hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --lr_schedule constant_step --num_warmup_steps 2"
    flags += " --curve const --keep_checkpoints 9" + term(labelled)
    assert fork(tmp_path / "one", flags)[0] == [0]
    job = tmp_path / "changing"
    there = f" --load_training_checkpoint {job}/training_state"
    for ranks, last in ((1, 3), (2, 8), (1, 12)):
        more = f" --max_steps {last}" + there * (last > 3)
        codes, *_ = fork(job, flags + more, ranks)
        assert codes == [0] * ranks, log(job)
    (_, expected), (_, got) = record(tmp_path / "one"), record(job)
    for which in (1, 4):  # the loss and the adversarial one
        found, wanted = ({values[0]: values[which] for values in curve if values[1] is not None} for curve in (got, expected))
        assert found == pytest.approx(wanted, abs=1e-5)
    first, second = (read_json(folder / "step0000012" / "args.json") for folder in (tmp_path / "one", job))
    assert (first["samples_seen"], first["tokens_seen"]) == (second["samples_seen"], second["tokens_seen"])


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_refuse_another_number_of_ranks(fork, tmp_path, stage):
    flags = f"--zero_stage {stage} --max_steps 4"
    assert fork(tmp_path / "job", flags, 2)[0] == [0, 0], log(tmp_path / "job")
    codes, *_ = fork(tmp_path / "job", f"{flags} --max_steps 6 --load_training_checkpoint {tmp_path}/job/training_state")
    assert codes == [2] and "ranks was 2, now 1; change the flags, or begin without it" in log(tmp_path / "job")


def test_two_ranks_agree_on_the_last_whole_state(fork, tmp_path):
    job = tmp_path / "job"
    assert fork(job, "--zero_stage 2", 2)[0] == [0, 0], log(job)
    expected = record(job)
    shutil.rmtree(job / "step0000012")
    shard = job / "training_state" / "step0000012" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert fork(job, "--zero_stage 2", 2)[0] == [0, 0], log(job)
    assert log(job).count(f"warning: {shard}: damaged") == 1 and f"going on from {job}/training_state/step0000009" in log(job)
    assert record(job) == expected
    shutil.rmtree(job / "step0000012")
    for file in (job / "training_state").glob("*/zero_pp_rank_0_*"):
        file.unlink()
    codes, *_ = fork(job, "--zero_stage 2", 2)
    assert 2 in codes and 0 not in codes
    assert "is missing" in log(job) and "no whole training state is left" in log(job) and "Traceback" not in log(job)


def test_two_ranks_stop_at_the_same_gap_and_cool_down(fork, tiny_rules, tmp_path):
    flags = f" --rule-path {tiny_rules} --gap_sentences 9 --gap_steps 3 --target_gap 9"
    flags += BRANCHES.replace("--branch_steps 4,12", "")
    assert fork(tmp_path / "job", flags, 2)[0] == [0, 0], log(tmp_path / "job")
    assert {"step0000003", "step0000003-cooled"} < record(tmp_path / "job")[0].keys()
    assert not list(tmp_path.glob("job/step0000004"))
