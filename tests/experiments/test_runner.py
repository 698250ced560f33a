"""The runner on made-up commands: order, failures, resuming, kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcfg.common.files import write_json
from pcfg.common.schema import write_schema
from pretraining.experiments.plan import Step
from pretraining.experiments.runner import Runner, is_done, lock
from pretraining.experiments.study import Choice, Decision, decision_file, read_statuses

ROOT = Path(__file__).parents[2]


def writes(path, text="x", before="pass", **rest):
    """A step that writes a file below OUT, and appends its name to `order`."""
    code = f"import os, pathlib, time; out = pathlib.Path('$OUT'); {before}; "
    code += f"open(out / 'order', 'a').write('{path} '); (out / '{path}').parent.mkdir(parents=True, exist_ok=True); "
    code += f"(out / '{path}').write_text('{text}')"
    return Step(name=path, words=("python", "-c", code), makes=(path,), **rest)


def run(steps, out, jobs=2):
    with lock(out) as descriptor:
        return Runner(steps, out, jobs, {}, descriptor).run()


def states(out):
    return {name: status.state for name, status in read_statuses(out).items()}


def test_in_order_and_nothing_twice(tmp_path, capsys):
    steps = [writes("a"), writes("b", needs=("a",)), writes("c", needs=("b",)), writes("d", after=("a", "c"))]
    assert run(steps, tmp_path)
    assert (tmp_path / "order").read_text() == "a b c d "
    assert set(states(tmp_path).values()) == {"done"}
    status = read_statuses(tmp_path)["c"]
    assert (tmp_path / status.log).read_text().startswith(f"$ OUT={tmp_path}; python -c ") and status.seconds > 0
    assert re.search(
        r"\[  4/4\] d: done in \d+ s  \(0:00:\d\d elapsed, [\d.e+]+ commands per minute\)\n", capsys.readouterr().out
    )
    assert run(steps, tmp_path)
    assert (tmp_path / "order").read_text() == "a b c d "
    assert capsys.readouterr().out.count("done already") == 4
    (tmp_path / "b").unlink()
    assert run(steps, tmp_path)
    assert (tmp_path / "order").read_text() == "a b c d b "


def test_two_at_a_time(tmp_path):
    # Each waits for the other's file: one at a time would never end.
    wait = "(out / '{0}.begun').touch(); t = time.monotonic()\nwhile not (out / '{1}.begun').exists(): time.sleep(0.01)\n"
    steps = [
        Step(
            name=name,
            words=(
                "python",
                "-c",
                f"import pathlib, time; out = pathlib.Path('$OUT'); {wait.format(name, other)}(out / '{name}').touch()",
            ),
            makes=(name,),
        )
        for name, other in (("a", "b"), ("b", "a"))
    ]
    assert run(steps, tmp_path)


def test_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    steps = [
        writes("a"),
        writes("bad", before="raise SystemExit(3)"),
        Step(name="liar", words=("python", "-c", "pass"), makes=("never",)),
        writes("needs", needs=("bad",)),
        writes("needs_more", needs=("needs",)),
        writes("after_both", after=("a", "bad")),
        writes("after_bad", after=("bad", "liar")),
        writes("choice", needs=("a",)),
        writes("not_due", needs=("choice",), choices=("rate",)),
        writes("not_due_either", needs=("not_due",)),
        writes("measures", after=("not_due",)),
    ]
    assert not run(steps, tmp_path)
    expected = {"a": "done", "bad": "failed", "liar": "failed", "needs": "blocked", "needs_more": "blocked"}
    expected |= {"after_both": "done", "after_bad": "blocked", "choice": "done", "not_due": "not due"}
    assert states(tmp_path) == expected | {"not_due_either": "not due", "measures": "not due"}
    found = read_statuses(tmp_path)
    assert found["bad"].exit_code == 3 and found["liar"].exit_code == 0 and "not make" in found["liar"].why
    assert found["needs"].why == "bad: failed" and found["not_due"].why == "choice rate admits none of its values"
    assert "bad: failed with exit code 3; see " in capsys.readouterr().out
    # Tried again, and mended.
    steps[1], steps[2] = writes("bad"), writes("liar")
    assert run(steps, tmp_path)
    assert states(tmp_path)["after_bad"] == "done"


def test_the_value_of_a_choice_is_put_in(tmp_path):
    choice = Choice(name="rate", group="g", flag="lr", values=(0.25, 1.0), rule="lowest_gap")
    decision = Decision(choice=choice, seeds=(1,), candidates=(), chosen=0.25)
    write_schema(tmp_path / decision_file("rate"), decision)
    assert run([writes("a", text="{rate} {seed}", choices=("rate",))], tmp_path)
    assert (tmp_path / "a").read_text() == "0.25 {seed}"


def test_records_of_the_models_that_are_there(tmp_path):
    step = Step(name="loss", words=(), records=(("m/1", "loss.json"), ("m/2", "comparison_*.json")))
    assert not is_done(step, tmp_path)  # no model at all
    for folder in ("m/1", "m/2"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m/2" / name).write_text("{}")
    assert not is_done(step, tmp_path)
    write_json(tmp_path / "m/2/comparison_0123.json", {})
    assert is_done(step, tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m/1" / name).write_text("{}")
    assert not is_done(step, tmp_path)


def test_statuses_of_other_experiments_stay(tmp_path):
    run([writes("a"), writes("b")], tmp_path)
    run([writes("c")], tmp_path)
    assert states(tmp_path) == {"a": "done", "b": "done", "c": "done"}


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests_steps import steps
from pcfg.common.cli import run_main
from pretraining.experiments.runner import Runner, lock
out = Path({out!r})
def main():
    with lock(out) as descriptor:
        print("begun", flush=True)
        Runner(steps, out, 2, {{}}, descriptor).run()
run_main(main)
"""


@pytest.fixture
def driver(tmp_path):
    """Starts a runner in a process of its own, on a step that saves when it is told to end, and then may take its time."""
    out = tmp_path / "out"
    code = (
        "import os, pathlib, signal, sys, time; out = pathlib.Path('$OUT')\n"
        "def end(*_):\n    while not (out / 'may_end').exists(): time.sleep(0.02)\n    (out / 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(out / 'pid').write_text(str(os.getpid()))\n"
        "deadline = time.monotonic() + (0 if (out / 'saved').exists() else 60)\n"
        "while time.monotonic() < deadline: time.sleep(0.02)\n"
        "(out / 'result').touch()\n"
    )
    (tmp_path / "tests_steps.py").write_text(
        "from pretraining.experiments.plan import Step\n"
        f"steps = [Step(name='slow', words=('python', '-c', {code!r}), makes=('result',))]\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def start():
        script = [sys.executable, "-c", DRIVER.format(root=str(ROOT), out=str(out))]
        return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)

    return out, start


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return path.read_text()


def test_killed_runner_takes_its_commands_along_and_the_next_one_waits_for_them(driver):
    out, start = driver
    with start() as first:
        wait_for(out / "pid")
        os.kill(first.pid, signal.SIGKILL)
    # The command is still ending, and the second runner may not begin before it has.
    with start() as second:
        assert "waiting for them" in second.stdout.readline()
        assert not (out / "saved").exists()
        (out / "may_end").touch()
        assert second.stdout.readline() == "begun\n"
        assert (out / "saved").exists()
        second.communicate(timeout=60)
    assert second.returncode == 0
    assert (out / "result").exists() and states(out) == {"slow": "done"}


def test_a_measurement_of_the_user_appears_when_its_command_has_ended_well(tmp_path):
    def step(then):
        code = f"open('$OUT/.mine.tmp', 'w').write('half'); {then}; open('$OUT/.mine.tmp', 'w').write('whole')"
        return Step(name="mine", words=("python", "-c", code), makes=("mine.json",), draft=".mine.tmp")

    assert not run([step("raise SystemExit(1)")], tmp_path) and not (tmp_path / "mine.json").exists()
    assert run([step("pass")], tmp_path) and (tmp_path / "mine.json").read_text() == "whole"


def test_an_interrupted_command_is_named_as_such(tmp_path, capsys):
    steps = [writes("ended", before="os.kill(os.getpid(), 15)"), writes("left", before="raise SystemExit(130)")]
    assert not run(steps, tmp_path, jobs=1)
    text = "failed with exit code {}; see .* .interrupted; run the studies again to resume."
    assert re.search("ended: " + text.format(-15) + ".*left: " + text.format(130), capsys.readouterr().out, re.S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_commands_first(driver, number):
    out, start = driver
    with start() as first:
        wait_for(out / "pid")
        (out / "may_end").touch()
        first.send_signal(number)
        first.communicate(timeout=60)
    assert first.returncode == 128 + number
    assert (out / "saved").exists() and not (out / "result").exists()
    assert json.loads((out / "status.json").read_text() if (out / "status.json").exists() else "{}") == {}
