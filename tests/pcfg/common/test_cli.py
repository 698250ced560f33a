"""Exit codes and argument types."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcfg.common.cli import Parser, Progress, file_name, folder_name, non_negative_int, positive_int, probability, run_main
from pcfg.common.files import InputError

ROOT = Path(__file__).parents[3]


def raising(exception):
    def main():
        raise exception

    return main


def test_an_input_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/script.py", "--flag"])
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(InputError("rules.txt:3: no such thing; give another")))
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.err == "script.py: error: rules.txt:3: no such thing; give another\n" and output.out == ""


def test_too_little_memory_of_a_gpu_names_the_flag_to_lower(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), memory="--bs")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "script.py: error: the GPU has not enough memory; give a smaller --bs\n"
    with pytest.raises(RuntimeError):
        run_main(raising(RuntimeError()), memory="--bs")


def test_an_interrupt_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(KeyboardInterrupt()))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


def test_sigterm_is_exit_code_143(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: signal.raise_signal(signal.SIGTERM))
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


def test_success_and_mistakes_of_ours_are_left_alone():
    assert run_main(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))


def test_a_wrong_flag_gets_a_hint(capsys):
    parser = Parser()
    parser.add_argument("--max_steps", type=int)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--maxsteps=5"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --maxsteps=5; did you mean --max_steps?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--zebra", "5"])
    assert "unrecognized arguments: --zebra 5\n" in capsys.readouterr().err


def test_names_that_are_not_utf_8_and_characters_that_stdout_lacks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from pcfg.common.cli import Parser, run_main\n"
        "parser = Parser()\n"
        "parser.add_argument('--file')\n"
        "run_main(lambda: print('read', (parser.parse_args().file or 'café').encode().decode()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}

    def run(*arguments, **more):
        command = [sys.executable, program, *arguments]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True)

    assert run().stdout == "read caf\\xe9\n" and run("--file", "café").returncode == 0
    for arguments, more in (([b"--file=caf\xe9"], {}), (["--file=café"], {"LC_ALL": "C", "PYTHONUTF8": "0"})):
        ended = run(*arguments, **more, PYTHONCOERCECLOCALE="0")
        assert ended.returncode == 2 and "not text in UTF-8" in ended.stderr and "Traceback" not in ended.stderr
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: "folder/caf\udce9".encode())
    assert stopped.value.code == 2


def test_long_work_is_forecast_once(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    for total in (100, 10):  # at 1 second each: long, and not worth a forecast
        with Progress(total=total, desc="fisher", unit="sentence", mininterval=0) as progress:
            progress._time = lambda: now[0]
            progress.start_t = progress.last_print_t = now[0]
            for _ in range(10):
                now[0] += 2
                progress.update()
    assert capsys.readouterr().out == "fisher: about 3 more minutes for all 100 sentences\n"


def test_names_of_what_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_name("new/deep") == Path("new/deep") and folder_name(".") == Path() and file_name("a.txt") == "a.txt"
    for kind, wrong in ((folder_name, ("", " ")), (file_name, ("", ".", "/", "..", str(tmp_path)))):
        for text in wrong:
            with pytest.raises(argparse.ArgumentTypeError, match="name"):
                kind(text)


def script(body, *arguments):
    return [sys.executable, "-c", f"from pcfg.common.cli import *\n{body}", *map(str, arguments)]


def test_a_process_ends_with_these_codes_and_no_traceback():
    fail = "def main():\n    raise InputError('value 7: too much')\nrun_main(main)"
    done = subprocess.run(script(fail), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "-c: error: value 7: too much\n")
    wait = "import time\ndef main():\n    print('on', flush=True)\n    time.sleep(60)\nrun_main(main)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(script(wait), cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted; run the same command again to resume\n")


def test_programs_that_do_not_share_their_work_refuse_several_ranks(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_main(lambda: None) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_main(lambda: None, ranks=True) is None
    with pytest.raises(SystemExit) as stopped:
        run_main(raising(ZeroDivisionError()))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(
        ": error: WORLD_SIZE 4: its work is not shared among ranks; start it by python alone\n"
    )
    listed = subprocess.run(["git", "grep", "-l", "run_main(main, ranks=True"], cwd=ROOT, capture_output=True, text=True)
    assert {"calculate_hessian.py", "calculate_loss.py", "run_pretraining.py"} == {*listed.stdout.split()} - {
        "tests/pcfg/common/test_cli.py"
    }


def test_a_closed_stdout_ends_quietly():
    body = "def main():\n    while True:\n        print('a line')\nrun_main(main)"
    with subprocess.Popen(script(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def programs():
    """The words after `python` of every program."""
    listed = subprocess.run(["git", "grep", "-l", "^    run_main(main", "--", "*.py"], cwd=ROOT, capture_output=True, text=True)
    paths = [Path(line) for line in listed.stdout.split() if not line.startswith("tests/")]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in paths]
    return [[str(path)] if len(path.parts) == 1 else ["-m", module] for path, module in zip(paths, modules, strict=True)]


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path):
    """In every program, with a numpy whose import takes forever."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    assert len(programs()) >= 19
    for words in programs():
        command = [sys.executable, *words, "--help"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            assert process.stdout.readline() == "importing\n", words
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (130, "interrupted; run the same command again to resume\n"), words


def test_a_module_is_named_as_its_user_started_it():
    command = [sys.executable, "-m", "pcfg.lookup", "--rule-path", "nowhere", "--datafile", "a", "--save-path", "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("python -m pcfg.lookup: error: ")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "20": 20}, ["0", "-1"]),
        (non_negative_int, {"0": 0, "20": 20}, ["-1"]),
        (probability, {"0": 0.0, "1": 1.0, "0.15": 0.15}, ["-0.1", "1.1", "nan", "inf"]),
    ],
)
def test_argument_types(kind, good, bad, capsys):
    for text, value in good.items():
        assert kind(text) == value and type(kind(text)) is type(value)
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=kind)
    for text in (*bad, "x", ""):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--value={text}"])
        assert stopped.value.code == 2
        assert f"argument --value: {text}" in (errors := capsys.readouterr().err) or "argument --value: invalid" in errors


@pytest.mark.parametrize("words", ["--rule-path x --n-processes 2", "--rule_path=x --n_processes=2", "--rule_pa x --n-proc 2"])
def test_both_spellings_of_a_flag_and_abbreviations(words):
    parser = Parser()
    parser.add_argument("--rule-path")
    parser.add_argument("--n_processes", type=int)
    options = parser.parse_args(words.split())
    assert (options.rule_path, options.n_processes) == ("x", 2)


def test_the_other_spelling_prefers_the_whole_flag_and_leaves_values_alone(capsys):
    parser = Parser()
    parser.add_argument("--max-steps")
    parser.add_argument("--max-steps-per-epoch")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--max_steps", "a_b-c"]).max_steps == "a_b-c"
    assert parser.parse_args(["--", "--max_steps"]).rest == ["--max_steps"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--max_st", "1"])
    assert "ambiguous" in capsys.readouterr().err
