import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import generate_downstream
from generate_downstream import main
from pcfg.common.files import InputError, sha256
from pcfg.common.text import read_labelled
from pcfg.grammar import write_rules
from pcfg.hmm import hmm_rules

ROOT = Path(generate_downstream.__file__).parent
RULES = """S S1 0.5
S S2 0.5
S1 A B 1.0
S2 B A 1.0
A C E 0.6
A C C 0.4
B E C 0.5
B E E 0.5
C D D 0.9
C F D 0.1
E F F 0.8
E W 0.2
D a 0.2
D b 0.3
D c 0.4
D d 0.1
F a 0.5
F b 0.1
F c 0.1
F d 0.3
W a 1.0
"""
SMALL = ["--sentence-num", "200", "--validation-num", "50"]


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.txt"
    path.write_text(RULES)
    return path


def run(rules, folder, *flags):
    main(["--rule-path", str(rules), "--save-path", str(folder), *flags])


def hashes(folder):
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("task", ["A", "B", "C"])
def test_files_of_a_task(rules, tmp_path, task):
    folder = tmp_path / "data"
    run(rules, folder, "--task-type", task, *SMALL)
    training, labels = read_labelled(folder / f"pcfg_{task}.csv")
    validation, validation_labels = read_labelled(folder / f"pcfg_{task}_validation.csv")
    assert (len(training), len(validation)) == (200, 50)
    assert not set(training) & set(validation)
    assert all(5 <= len(text.split()) <= 31 for text in training + validation)
    names = json.loads((folder / f"pcfg_{task}_labels.json").read_text())["names"]
    assert set(names) >= {str(label) for label in labels + validation_labels}
    assert list(names.values()) == (["S1", "S2"] if task == "A" else list("ABCDEFS") + ["S1", "S2", "W"])
    assert len(set(labels)) > 1
    facts = json.loads((folder / f"manifest_downstream_{task}.json").read_text())["files"][f"pcfg_{task}.csv"]
    assert facts["rows"] == 200
    assert facts["classes"] == len(set(labels))


def test_limits_rule_span_and_seed_decide_the_rows(rules, tmp_path):
    flags = ("--task-type", "B", *SMALL)
    run(rules, tmp_path / "base", *flags)
    run(rules, tmp_path / "same", *flags)
    assert hashes(tmp_path / "base") == hashes(tmp_path / "same")
    base = read_labelled(tmp_path / "base" / "pcfg_B.csv")
    for name, more in (("seed", ["--seed", "1"]), ("span", ["--span", "2"]), ("rule", ["--label-rule", "posterior"])):
        run(rules, tmp_path / name, *flags, *more)
        other = read_labelled(tmp_path / name / "pcfg_B.csv")
        assert other != base
        assert (other[0] == base[0]) == (name == "span")
    run(rules, tmp_path / "limits", *flags, "--min-words", "6", "--length-limit", "8")
    assert {len(text.split()) for text in read_labelled(tmp_path / "limits" / "pcfg_B.csv")[0]} == {6, 7}


def test_rerun_skips_repairs_and_refuses(rules, tmp_path, capsys):
    folder = tmp_path / "data"
    run(rules, folder, "--task-type", "C", *SMALL)
    made = hashes(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    run(rules, folder, "--task-type", "C", *SMALL)
    assert capsys.readouterr().out.count("skipped") == 2
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "pcfg_C_validation.csv").write_text("text,label\na b,0\n")
    run(rules, folder, "--task-type", "C", *SMALL)
    assert hashes(folder) == made
    with pytest.raises(InputError, match="seed was 0, now 1.*--overwrite"):
        run(rules, folder, "--task-type", "C", *SMALL, "--seed", "1")
    run(rules, folder, "--task-type", "C", *SMALL, "--seed", "1", "--overwrite")
    assert hashes(folder).keys() == made.keys()
    assert hashes(folder)["pcfg_C.csv"] != made["pcfg_C.csv"]


def test_a_killed_run_leaves_nothing_half_and_is_finished_by_a_rerun(rules, tmp_path):
    flags = ["--task-type", "B", "--sentence-num", "30000", "--validation-num", "10000"]
    run(rules, tmp_path / "whole", *flags)
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "generate_downstream.py"), "--rule-path", str(rules)]
    process = subprocess.Popen([*command, "--save-path", str(folder), *flags], stdout=subprocess.DEVNULL)
    # The folder is made when the first file is begun.
    while not folder.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    complete = hashes(tmp_path / "whole")
    for name, found in hashes(folder).items():
        assert name.startswith(".") or name.startswith("manifest") or found == complete[name]
    # what a kill in the middle of a write leaves
    (folder / ".pcfg_B.csv.tmp").write_text("text,la")
    subprocess.run([*command, "--save-path", str(folder), *flags], check=True, stdout=subprocess.DEVNULL)
    assert hashes(folder) == complete


# Imports and warms up once, then makes the files in one forked child after the other, so that moments of the work are met.
FORKS = """
import json, os, signal, sys, time
import generate_downstream
generate_downstream.main(json.loads(sys.stdin.readline()))
for line in sys.stdin:
    arguments, moment = json.loads(line)
    child, begun = os.fork(), time.monotonic()
    if child == 0:
        generate_downstream.main(arguments)
        os._exit(0)
    if moment is not None:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([status, time.monotonic() - begun]), file=sys.stderr, flush=True)
"""


def test_runs_killed_at_any_moment_are_finished_by_a_rerun(rules, tmp_path):
    flags = [
        "--rule-path",
        str(rules),
        "--task-type",
        "B",
        "--sentence-num",
        "20000",
        "--validation-num",
        "5000",
        "--save-path",
    ]
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes) as forks:

        def make(folder, moment=None):
            print(json.dumps([[*flags, str(folder)], moment]), file=forks.stdin, flush=True)
            return json.loads(forks.stderr.readline())

        print(json.dumps([*flags, str(tmp_path / "whole")]), file=forks.stdin, flush=True)
        status, seconds = make(tmp_path / "timed")
        complete, rng, stopped = hashes(tmp_path / "whole"), np.random.default_rng(11), 0
        assert status == 0 and hashes(tmp_path / "timed") == complete
        while stopped < 20:
            folder = tmp_path / f"killed{stopped}"
            status, took = make(folder, rng.uniform(0, seconds))
            found = hashes(folder) if folder.exists() else {}
            assert all(name.startswith((".", "manifest")) or sha == complete[name] for name, sha in found.items())
            assert make(folder)[0] == 0 and hashes(folder) == complete
            if status == signal.SIGKILL:
                stopped += 1
            else:
                # done before it was killed: the run that was timed took longer than they usually do
                seconds = 0.9 * min(seconds, took)
                shutil.rmtree(folder)
        forks.stdin.close()


def test_states_of_a_hidden_markov_model(tmp_path):
    """Two states that can be seen through: the words of each are its own, so the label follows from the word."""
    rules = tmp_path / "hmm.txt"
    transition = [[0.7, 0.3], [0.4, 0.6]]
    emission = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    law = {"length": np.full(10, 0.1), "states": ["low", "high"], "words": ["a", "b", "y", "z"]}
    write_rules(rules, hmm_rules([0.5, 0.5], transition, emission, **law), [])
    run(rules, tmp_path / "data", "--task-type", "state", "--position", "6", *SMALL)
    assert set(hashes(tmp_path / "data")) == {
        "pcfg_state6.csv",
        "pcfg_state6_validation.csv",
        "pcfg_state6_labels.json",
        "manifest_downstream_state6.json",
    }
    names = json.loads((tmp_path / "data" / "pcfg_state6_labels.json").read_text())["names"]
    assert names == {"0": "low", "1": "high"}
    training, labels = read_labelled(tmp_path / "data" / "pcfg_state6.csv")
    validation, validation_labels = read_labelled(tmp_path / "data" / "pcfg_state6_validation.csv")
    assert (len(training), len(validation)) == (200, 50) and not set(training) & set(validation)
    assert {len(text.split()) for text in training} == {6, 7, 8, 9, 10}
    for text, label in zip(training + validation, labels + validation_labels, strict=True):
        assert names[str(label)] == ("low" if text.split()[5] in "ab" else "high")
    with pytest.raises(InputError, match="--position 11: the grammar's sentences have up to 10 words"):
        run(rules, tmp_path / "more", "--task-type", "state", "--position", "11", *SMALL)
    with pytest.raises(InputError, match="--position 6: no sentence has at least 6 words and fewer than --length-limit 6"):
        run(rules, tmp_path / "more", "--task-type", "state", "--position", "6", "--length-limit", "6", *SMALL)


def test_files_of_spans_depths_and_adversarial_sentences(rules, tmp_path):
    flags = [*SMALL, "--adversarial-num", "100", "--text-num", "80", "--drop-unlabelled"]
    for name, task, span in (("span_2-5", "span", "2:5"), ("span_-7-end", "span", "-7:"), ("depth", "depth", None)):
        run(rules, tmp_path, "--task-type", task, *([f"--span={span}"] if span else []), *flags)
        files = [tmp_path / f"pcfg_{name}{split}.csv" for split in ("", "_validation", "_adversarial", "_text")]
        parts = [read_labelled(file) for file in files]
        assert [len(texts) for texts, _ in parts] == [200, 50, 100, 80]
        assert len(set().union(*(texts for texts, _ in parts))) == sum(len(set(texts)) for texts, _ in parts)
        training = parts[0]
        names = json.loads((tmp_path / f"pcfg_{name}_labels.json").read_text())
        assert names["span"] == span and names["names"].keys() >= set(map(str, training[1]))
        # the label of a span may need longer sentences than the default of 5 words
        assert names["min_words"] == (7 if span == "-7:" else 5) <= min(len(text.split()) for text in training[0])
    # five rules lead to each word: S -> S1, S1 -> A B, A -> C E, C -> D D, D -> a, and as many through F and W
    assert set(training[1]) == {5}


ERRORS = [
    (["--task-type", "state"], "--position None"),
    (["--task-type", "state", "--position", "3"], "--task-type state: the grammar is no hidden Markov model"),
    (["--task-type", "B", "--position", "3"], "--position 3"),
    (["--task-type", "A", "--span", "3"], "--span 3: task A labels whole sentences"),
    (["--task-type", "B", "--min-words", "9", "--length-limit", "9"], "--min-words 9"),
    (["--task-type", "B", "--length-limit", "66"], "--length-limit 66"),
    (["--task-type", "B", "--span", "20"], "no nonterminal derives the words 0:20 of .* or --drop-unlabelled"),
    (["--task-type", "B", "--span", "2:5"], "--span 2:5: task B takes a number of words; take --task-type span"),
    (["--task-type", "span"], "--task-type span: give the words as --span START:STOP"),
    (["--task-type", "span", "--span", "3"], "--span 3: task span takes START:STOP"),
    (["--task-type", "span", "--span", "5:2"], "--span 5:2: no sentence of up to 64 words has such words"),
    (["--task-type", "span", "--span", "a:2"], "--span a:2: task span takes START:STOP"),
    (["--task-type", "span", "--span", "8:40"], "--span 8:40: the grammar's sentences have up to 8 words"),
    (["--task-type", "depth", "--label-rule", "posterior"], "--label-rule posterior: the label of task depth is by the most"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else None)
def test_errors_name_the_flag(rules, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(rules, tmp_path / "data", *flags, *SMALL)
    # Nothing is left that would stand in the way of a corrected command.
    assert not (tmp_path / "data").exists()


def test_task_a_needs_unary_rules_of_the_start(tmp_path):
    path = tmp_path / "flat.txt"
    path.write_text("S A A 0.6\nS S S 0.4\nA a 0.5\nA b 0.5\n")
    with pytest.raises(InputError, match="--task-type A: the start symbol 'S' has no unary rules"):
        run(path, tmp_path / "data", "--task-type", "A", *SMALL)


def test_too_few_distinct_sentences_are_counted(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("S A A 1.0\nA B B 1.0\nB C C 1.0\nC c 1.0\n")
    with pytest.raises(InputError, match=r"not enough distinct sentences .*\(1 were seen"):
        run(path, tmp_path / "data", "--task-type", "B", *SMALL)
    assert not (tmp_path / "data").exists()


def test_some_sentences_without_a_label_are_dropped_and_counted(tmp_path):
    """Nothing derives the first 2 words of the sentences that begin with a bare word."""
    path = tmp_path / "drop.txt"
    path.write_text("S P T 0.7\nS W T 0.3\nT P Q 1.0\nP W V 1.0\nQ W V 1.0\nW a 0.4\nW b 0.6\nV c 0.1\nV d 0.2\nV e 0.7\n")
    run(path, tmp_path / "data", "--task-type", "C", *SMALL, "--seed", "3")
    facts = json.loads((tmp_path / "data" / "manifest_downstream_C.json").read_text())["files"]["pcfg_C.csv"]
    texts, _ = read_labelled(tmp_path / "data" / "pcfg_C.csv")
    assert len(texts) == 200
    # 30% have no label: 200 / 0.7 - 200 = 86 are expected to be dropped on the way to 200 rows, give or take 11
    assert 86 - 4 * 11 < facts["dropped"] < 86 + 4 * 11
    assert not any(text.split()[1] in "ab" for text in texts)


def test_short_languages_have_tasks_without_a_limit_of_words(tmp_path):
    """All sentences have 4 words, fewer than the 5 that longer languages begin with."""
    run("rule_mini_headroom.txt", tmp_path / "data", "--task-type", "A", *SMALL)
    training, labels = read_labelled(tmp_path / "data" / "pcfg_A.csv")
    assert {len(text.split()) for text in training} == {4} and len(set(labels)) > 3
    assert json.loads((tmp_path / "data" / "manifest_downstream_A.json").read_text())["made_from"]["min_words"] == 4
    with pytest.raises(InputError, match="--min-words 5: the grammar's sentences have up to 4 words"):
        run("rule_mini_headroom.txt", tmp_path / "more", "--task-type", "A", *SMALL, "--min-words", "5")


def test_more_unlabelled_sentences_than_rows_are_dropped_on_request(tmp_path, capsys):
    """Nothing derives the first 2 words of 80% of the sentences."""
    path = tmp_path / "drop.txt"
    path.write_text("S P T 0.2\nS W T 0.8\nT P Q 1.0\nP W V 1.0\nQ W V 1.0\nW a 0.4\nW b 0.6\nV c 0.1\nV d 0.2\nV e 0.7\n")
    with pytest.raises(InputError, match=r"task C: no nonterminal derives the words 0:2 of .* or --drop-unlabelled"):
        run(path, tmp_path / "data", "--task-type", "C", *SMALL)
    run(path, tmp_path / "data", "--task-type", "C", *SMALL, "--drop-unlabelled")
    facts = json.loads((tmp_path / "data" / "manifest_downstream_C.json").read_text())["files"]["pcfg_C.csv"]
    # 200 / 0.2 - 200 = 800 are expected to be dropped on the way to 200 rows, give or take 63
    assert facts["rows"] == 200 and abs(facts["dropped"] - 800) < 4 * 63
    assert f"{facts['dropped']} sentences without a label dropped" in capsys.readouterr().out


def test_equal_scores_are_counted(tmp_path, capsys):
    """P and Q derive the sentences whose second word is a with the same probability, another by one of them alone."""
    path = tmp_path / "ties.txt"
    words = "".join(f"W w{number} 0.05\n" for number in range(10))
    path.write_text(f"S P 0.5\nS Q 0.5\nP W W 1.0\nQ W V 1.0\nW a 0.5\n{words}V a 0.5\nV c 0.5\n")
    run(path, tmp_path / "data", "--task-type", "A", *SMALL)
    facts = json.loads((tmp_path / "data" / "manifest_downstream_A.json").read_text())["files"]["pcfg_A.csv"]
    with (tmp_path / "data" / "pcfg_A.csv").open() as file:
        rows = [(row["text"].split()[1], row["label"]) for row in csv.DictReader(file)]
    assert facts["ties"] == rows.count(("a", "0")) > 0 and ("a", "1") not in rows and ("c", "1") in rows
    assert f"; {facts['ties']} ties took the lowest id" in capsys.readouterr().out


def test_a_missing_grammar_is_exit_code_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "generate_downstream.py"), "--rule-path", "nothing.txt", "--task-type", "B"]
    result = subprocess.run([*command, "--save-path", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "nothing.txt" in result.stderr
    assert "Traceback" not in result.stderr
