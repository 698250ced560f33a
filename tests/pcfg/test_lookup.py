import contextlib
import os
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from pcfg import lookup
from pcfg.chart import Chart
from pcfg.common.files import InputError
from pcfg.common.means import SentenceMeans
from pcfg.common.text import text_blocks, write_labelled
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable, main
from pcfg.sampler import Sampler

RULES = """S S S 0.3
S A B 0.7
A a 0.5
A b 0.4
A c 0.1
B b 0.3
B d 0.7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lookup")
    (folder / "rules.txt").write_text(RULES)
    sampler = Sampler(Grammar.read(folder / "rules.txt"), 12)
    for name, seed in (("text.txt", 0), ("other.txt", 1)):
        (folder / name).write_bytes(sampler.to_text(*sampler.sample(300, np.random.default_rng(seed))))
    return folder


def run(folder, text="text.txt", save="lookup.hdf5", rules="rules.txt", *flags):
    main(["--rule-path", str(folder / rules), "--datafile", str(folder / text), "--save-path", str(folder / save), *flags])
    return folder / save


@pytest.fixture(scope="module")
def table_path(folder):
    return run(folder)


def test_file_memory_and_chart_agree(folder, table_path, monkeypatch):
    grammar = Grammar.read(folder / "rules.txt")
    texts = [line for line in (folder / "text.txt").read_text().splitlines() if line]
    tokens, lengths = grammar.encode(texts, "text")
    expected, offsets = Chart(grammar, dtype="float64").conditionals(tokens, lengths)
    # the table in memory is made a few sentences at a time
    monkeypatch.setattr(lookup, "BLOCK_ELEMENTS", 7 * len(grammar.words) * tokens.shape[1])
    for table in (LookupTable.open(table_path), LookupTable.compute(grammar, texts, folder / "text.txt")):
        assert table.words == grammar.words
        assert table.lengths.tolist() == lengths.tolist()
        assert table.offsets.tolist() == offsets.tolist()
        assert [table.words[word] for word in table.true_words] == " ".join(texts).split()
        found = table.conditionals(0, len(texts))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(table.conditionals(5, 9), found[offsets[5] : offsets[9]])
        for row in range(0, len(expected), 17):
            probabilities = expected[row][expected[row] > 0]
            assert table.entropy[row] == pytest.approx(-np.sum(probabilities * np.log(probabilities)), abs=1e-6)
            assert table.log_true[row] == pytest.approx(np.log(expected[row, table.true_words[row]]), abs=1e-6)
        table.check_text(folder / "text.txt")
        with pytest.raises(InputError, match="made from another text"):
            table.check_text(folder / "other.txt")


def test_float16_is_rounded_last(folder, table_path):
    full = LookupTable.open(table_path)
    half = LookupTable.open(run(folder, "text.txt", "half.hdf5", "rules.txt", "--dtype", "float16"))
    assert (full.stored, half.stored) == ("float32", "float16")
    rows = half.conditionals(0, len(half.lengths))
    expected = full.conditionals(0, len(full.lengths))
    assert 0 < np.abs(rows - expected).max() < 1e-3
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=0, atol=1e-14)
    for name in ("entropy", "log_true", "true_words", "lengths"):
        np.testing.assert_array_equal(getattr(half, name), getattr(full, name))
    with pytest.raises(InputError, match="half.hdf5: made with --dtype float16"):
        run(folder, "text.txt", "half.hdf5")


def test_entropy_only(folder, table_path):
    full = LookupTable.open(table_path)
    path = run(folder, "text.txt", "entropy.hdf5", "rules.txt", "--entropy-only")
    table = LookupTable.open(path)
    for name in ("entropy", "log_true", "true_words", "lengths"):
        np.testing.assert_array_equal(getattr(table, name), getattr(full, name))
    with pytest.raises(InputError, match="entropy.hdf5: has no distributions"):
        table.conditionals(0, 1)
    with pytest.raises(InputError, match="entropy.hdf5: made with --entropy-only"):
        run(folder, "text.txt", "entropy.hdf5")
    with pytest.raises(SystemExit):
        run(folder, "text.txt", "other.hdf5", "rules.txt", "--entropy-only", "--dtype", "float16")


def test_a_long_text_in_blocks_is_the_text_at_once(folder, table_path, monkeypatch):
    """Blocks of the file that end within the text, and blocks of sentences that end within those."""
    monkeypatch.setattr(lookup, "text_blocks", lambda path: text_blocks(path, 101))
    monkeypatch.setattr(lookup, "BLOCK_SENTENCES", 3)
    monkeypatch.setattr(lookup, "BLOCK_ELEMENTS", 100)
    for flags in ((), ("--entropy-only",)):
        path = run(folder, "text.txt", f"blocks{len(flags)}.hdf5", "rules.txt", *flags)
        table, whole = LookupTable.open(path), LookupTable.open(table_path)
        for name in ("entropy", "log_true", "true_words", "lengths"):
            np.testing.assert_array_equal(getattr(table, name), getattr(whole, name))
        means = table.mean_entropy()
        at_once = SentenceMeans().add(whole.entropy, whole.lengths)
        assert means.by_pairs() == pytest.approx(at_once.by_pairs(), rel=1e-7, abs=1e-7)
        assert means.by_sentences() == pytest.approx(at_once.by_sentences(), rel=1e-7, abs=1e-7)
    (folder / "bad.txt").write_text("a b\n\n" * 60 + "b a\n")
    with pytest.raises(InputError, match="can't derive sentence 61 .'b a'"):
        run(folder, "bad.txt", "bad.hdf5")
    assert not list(folder.glob("*bad.hdf5*"))


def test_killed_and_run_again_gives_the_same_bytes(folder):
    """SIGKILL at moments over the life of the process; what a rerun leaves is what an undisturbed run leaves."""
    place = folder / "killed"
    place.mkdir()
    source = folder / "long.txt"
    source.write_text("\n\n".join(["a b", "b d a b", "c d"] * 40_000) + "\n")
    command = [sys.executable, "-m", "pcfg.lookup", "--rule-path", str(folder / "rules.txt"), "--datafile", str(source)]
    started = time.monotonic()
    subprocess.run([*command, "--save-path", str(place / "whole.hdf5")], check=True, capture_output=True)
    seconds = time.monotonic() - started
    moments = np.random.default_rng(0).uniform(0.3, 1, size=20 if os.environ.get("LONG_TESTS") else 8) * seconds
    for moment in moments:
        process = subprocess.Popen(
            [*command, "--save-path", str(place / "t.hdf5")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        process.wait()
        if (place / "t.hdf5").exists():
            assert (place / "t.hdf5").read_bytes() == (place / "whole.hdf5").read_bytes()
            (place / "t.hdf5").unlink()
    subprocess.run([*command, "--save-path", str(place / "t.hdf5")], check=True, capture_output=True)
    assert (place / "t.hdf5").read_bytes() == (place / "whole.hdf5").read_bytes()
    assert sorted(path.name for path in place.iterdir()) == ["t.hdf5", "whole.hdf5"]


def test_csv_gives_the_same_table(folder, table_path):
    texts = [line for line in (folder / "text.txt").read_text().splitlines() if line]
    write_labelled(folder / "labelled.csv", texts, [0] * len(texts))
    table = LookupTable.open(run(folder, "labelled.csv", "csv.hdf5"))
    np.testing.assert_array_equal(table.entropy, LookupTable.open(table_path).entropy)
    table.check_text(folder / "labelled.csv")


def test_expected_log_probability_is_the_entropy(folder):
    sampler = Sampler(Grammar.read(folder / "rules.txt"), 8)
    texts = sampler.texts(*sampler.sample(20_000, np.random.default_rng(2)))
    table = LookupTable.compute(Grammar.read(folder / "rules.txt"), texts, "memory")
    mean, error = SentenceMeans().add(-table.log_true - table.entropy, table.lengths).by_pairs()
    # Sentences were cut at 8 words, which changes no conditional: x_-t fixes the length.
    assert abs(mean) < 4 * error < 0.02
    with pytest.raises(InputError, match="sha256 none"):
        table.check_text(folder / "text.txt")


def test_rerun_skips_and_other_inputs_are_refused(folder, table_path, capsys):
    before = table_path.stat().st_mtime_ns
    run(folder)
    assert "skipped" in capsys.readouterr().out
    assert table_path.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another text; .*--overwrite"):
        run(folder, "other.txt")
    (folder / "changed.txt").write_text(RULES.replace("0.3\nS A B 0.7", "0.2\nS A B 0.8"))
    with pytest.raises(InputError, match="another grammar"):
        run(folder, rules="changed.txt")
    copy = folder / "copy.hdf5"
    copy.write_bytes(table_path.read_bytes())
    run(folder, "other.txt", "copy.hdf5", "rules.txt", "--overwrite")
    LookupTable.open(copy).check_text(folder / "other.txt")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a b\na z\n", "sentence 2.*'z'"), ("a b\n\nb a\n", "can't derive sentence 2 .'b a'"), ("", "empty|no sentence")],
)
def test_a_text_of_another_grammar_is_refused(folder, text, message):
    (folder / "bad.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        run(folder, "bad.txt", "bad.hdf5")
    assert not list(folder.glob("*bad.hdf5*"))


def test_a_disk_that_cannot_hold_the_table_is_refused_before_the_work(folder, monkeypatch):
    size = 4 * sum(len(line.split()) for line in (folder / "text.txt").read_text().splitlines())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - size, size))
    monkeypatch.setattr(Chart, "conditionals_and_reductions", None)
    with pytest.raises(InputError, match=r"full.hdf5: .* GB to write, but the disk has"):
        run(folder, save="full.hdf5")
    assert not list(folder.glob("*full.hdf5*"))


def test_missing_text_and_text_as_target(folder):
    with pytest.raises(InputError, match="missing.txt: no such file"):
        run(folder, "missing.txt")
    with pytest.raises(InputError, match="is the text itself"):
        run(folder, "text.txt", "text.txt", "rules.txt", "--overwrite")


def test_what_is_not_a_table_is_refused(folder, table_path):
    with pytest.raises(InputError, match="no such file"):
        LookupTable.open(folder / "nothing.hdf5")
    content = np.frombuffer(table_path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    broken = folder / "broken.hdf5"
    for size in (0, 1, 100, 5000):
        broken.write_bytes(rng.bytes(size))
        with pytest.raises(InputError, match="not a lookup table"):
            LookupTable.open(broken)
    for size in (50, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:size].tobytes())
        with pytest.raises(InputError):
            LookupTable.open(broken)


@pytest.mark.parametrize("change", ["conditionals", "true_words", "text_sha256", "format", "range", "shape"])
def test_a_table_with_parts_missing_or_wrong_is_refused(folder, table_path, change):
    broken = folder / "broken.hdf5"
    broken.write_bytes(table_path.read_bytes())
    with h5py.File(broken, "r+") as file:
        if change in ("conditionals", "true_words"):
            del file[change]
        elif change == "text_sha256":
            del file.attrs[change]
        elif change == "format":
            file.attrs["format"] = 99
        elif change == "range":
            file["true_words"][3] = 1000
        else:
            del file["entropy"]
            file["entropy"] = np.zeros(3)
    with pytest.raises(InputError, match="broken.hdf5"):
        LookupTable.open(broken)


def test_flipped_bytes_are_found_and_tables_without_checksum_are_read(folder, table_path):
    content = table_path.read_bytes()
    damaged = folder / "damaged.hdf5"
    with h5py.File(table_path) as file:
        texts = {"words": content.index(b"d", content.index(b"GCOL"))}
        places = {name: file[name].id.get_offset() + 8 for name in ("conditionals", "entropy", "log_true")} | texts
    for name, place in places.items():
        damaged.write_bytes(content[:place] + bytes(byte ^ 1 for byte in content[place : place + 4]) + content[place + 4 :])
        with pytest.raises(InputError, match="damaged.hdf5: "):
            LookupTable.open(damaged)
        assert name in h5py.File(damaged)
    damaged.write_bytes(content)
    with h5py.File(damaged, "r+") as file:
        del file.attrs["sha256"]
        file["entropy"][0] = 7.0
    assert LookupTable.open(damaged).entropy[0] == 7.0


def test_entropy_of_the_published_grammar(published_rules):
    """4.4565 (pairs) and 4.1850 (sentences) nats, known from 1e6 sentences to 0.0004 and 0.0010; all lengths."""
    grammar = Grammar.read(published_rules)
    sampler = Sampler(grammar, 31)
    texts = sampler.texts(*sampler.sample(20_000, np.random.default_rng(8)))
    table = LookupTable.compute(grammar, texts, "sampled sentences")
    for function, expected in ((SentenceMeans.by_pairs, 4.4565), (SentenceMeans.by_sentences, 4.1850)):
        mean, error = function(SentenceMeans().add(table.entropy, table.lengths))
        print(f"{function.__name__}: {mean:.4f} +- {error:.4f}")
        assert abs(mean - expected) < 4 * error
        assert error < 0.01
