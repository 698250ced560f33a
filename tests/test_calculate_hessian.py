import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import calculate_hessian
import pcfg.lookup
from pcfg.common.files import InputError
from pretraining.data.samples import sample_paths
from pretraining.evaluation import hessian


@pytest.fixture
def setting(tiny_rules, tiny_data, tiny_model, tmp_path):
    """A model folder and a text with vocabulary and lookup table."""
    shutil.copytree(tiny_model, tmp_path / "models" / "step1")
    for name in ("test0.txt", "vocab.txt"):
        shutil.copy(tiny_data / name, tmp_path)
    table = tmp_path / "lookup.hdf5"
    pcfg.lookup.main(["--rule-path", str(tiny_rules), "--datafile", str(tmp_path / "test0.txt"), "--save-path", str(table)])
    return tmp_path, table


def flags(folder, *more, **changes):
    given = {"--model-path": folder / "models", "--datafile": folder / "test0.txt", "--vocabfile": "vocab.txt", **changes}
    return [str(part) for pair in given.items() for part in pair] + list(map(str, more))


def read(folder, name="hessian.json"):
    return json.loads((folder / "models" / "step1" / name).read_text())


def check_parts(record):
    """Both partitions sum to the value."""
    for parts in record["parts"].values():
        assert sum(part["value"] for part in parts.values()) == pytest.approx(record["value"], rel=1e-9)
    assert list(record["parts"]["layers"]) == ["embeddings", "layer_0", "layer_1", "final_norm", "head"]
    groups = ["word_table", "position_table", "token_type_table", "encoder_matrices", "vectors", "head"]
    assert list(record["parts"]["groups"]) == groups


def check_flatness(record, printed):
    """Balanced trace, R and share of constant directions are those of the recorded parts, and printed."""
    balanced = record["balanced"]
    parts = [balanced[name] for name in ("tables", "head_norm", "matrices", "vectors")]
    assert sum(parts) == pytest.approx(record["value"])
    assert (
        balanced["value"] == pytest.approx(2 * (parts[0] * parts[1]) ** 0.5 + sum(parts[2:])) and balanced["standard_error"] > 0
    )
    tensors = record["tensors"]
    assert sum(tensor["value"] for tensor in tensors.values()) == pytest.approx(record["value"])
    assert sum(tensor["size"] for tensor in tensors.values()) == record["parameters"]
    relative = sum(tensor["value"] * tensor["squared_norm"] for tensor in tensors.values())
    assert record["relative"]["value"] == pytest.approx(relative)
    assert record["constant_share"]["value"] > tensors["embeddings.token_types.weight"]["value"] / record["value"]
    assert f"balanced trace {balanced['value']:.4f} +- " in printed and f"flatness R {relative:.4f} +- " in printed


def test_the_readmes_command(setting, capsys):
    folder, table = setting
    calculate_hessian.main(flags(folder, "--nsamples", 20, **{"--condprobfile": table}))
    record, printed = read(folder), capsys.readouterr().out
    assert record["estimator"] == "fisher" and record["n"] == 20 and record["standard_error"] > 0
    assert record["left_out"] == ["decoder_bias"] and record["draws"] == record["contexts"] > 2 * 20
    assert float((folder / "models" / "step1" / "hessian.txt").read_text()) == pytest.approx(record["value"], abs=1e-5)
    check_parts(record)
    true, other = record["true_labels"], record["hutchinson"]
    assert true["difference"]["value"] == pytest.approx(record["value"] - true["value"])
    assert other["n"] == 2 and other["sentences"] == 20 and other["difference"]["standard_error"] > 0
    assert other["difference"]["value"] == pytest.approx(record["value"] - other["value"], rel=1e-6)
    assert f"step1: Fisher trace {record['value']:.4f} +- " in printed and record["quantity"] == "Fisher trace"
    assert f"true conditionals: {true['value']:.4f} +- " in printed
    assert f"Hessian trace (Hutchinson): {other['value']:.4f} +- " in printed and other["loss"] == "exact"
    check_flatness(record, printed)


def test_both_estimators_side_by_side(setting, tiny_rules, capsys):
    folder, _ = setting
    more = ["--nsamples", 24, "--block-size", 8, "--probe", "gaussian", "--probe-num", 2, "--estimator", "both"]
    calculate_hessian.main(flags(folder, *more, **{"--rule-path": tiny_rules}))
    fisher, hutchinson = read(folder), read(folder, "hessian_hutchinson.json")
    assert (fisher["estimator"], hutchinson["estimator"]) == ("fisher", "hutchinson")
    assert (hutchinson["n"], hutchinson["draws"], hutchinson["sentences"]) == (3, 6, 24)
    assert fisher["hutchinson"]["value"] == hutchinson["value"]
    check_parts(hutchinson)
    assert hutchinson["fisher"] == {key: fisher[key] for key in ("value", "standard_error", "n", "sentences", "draws")} | {
        "difference": fisher["hutchinson"]["difference"]
    }
    printed = capsys.readouterr().out
    for record, text in (
        (fisher, "Fisher trace {} (mean over 24 sentences)"),
        (hutchinson, "Hessian trace (Hutchinson) {} (mean over 24 sentences in 3 blocks, loss: exact)"),
    ):
        assert text.format(f"{record['value']:.4f} +- {record['standard_error']:.4f}") in printed
    calculate_hessian.main(flags(folder, *more, **{"--rule-path": tiny_rules}))
    assert "skipped" in capsys.readouterr().out


def test_without_conditionals(setting, capsys):
    folder, _ = setting
    calculate_hessian.main(flags(folder, "--nsamples", 6))
    assert "true_labels" not in read(folder) and "hutchinson" not in read(folder)
    calculate_hessian.main(flags(folder, "--nsamples", 6, "--estimator", "hutchinson", "--block-size", 2, "--probe-num", 1))
    record = read(folder, "hessian_hutchinson.json")
    assert (record["n"], record["draws"]) == (3, 3)
    assert (record["quantity"], record["loss"]) == ("Hessian trace (Hutchinson)", "words of the text")
    other = record["fisher"]  # on the same sentences
    assert other["value"] == pytest.approx(read(folder)["value"]) and other["sentences"] == 6
    assert other["difference"]["value"] == pytest.approx(other["value"] - record["value"])
    balanced = record["balanced"]  # three blocks with one probe each tell nothing
    assert balanced["value"] is None and balanced["standard_error"] is None and record["constant_share"] is None
    assert "is not above 2 standard errors" in balanced["reason"]
    assert f"balanced trace not defined: {balanced['reason']}; relative flatness R " in capsys.readouterr().out


def test_soft_labels_and_positions(setting):
    folder, _ = setting
    values = []
    for draws in (["--soft-labels"], ["--draws", 40]):
        calculate_hessian.main(flags(folder, "--nsamples", 8, "--positions", 2, "--overwrite", *draws))
        values.append(read(folder))
    soft, drawn = values
    assert soft["contexts"] == drawn["contexts"] == 16 and drawn["draws"] == 16 * 40
    assert soft["arguments"]["soft_labels"] is True and soft["arguments"]["positions"] == 2
    assert drawn["value"] == pytest.approx(soft["value"], rel=0.2)


def test_a_relative_error_to_stop_at(setting, capsys):
    folder, _ = setting
    calculate_hessian.main(flags(folder, "--target-relative-error", 0.5, "--min-draws", 300))
    record = read(folder)
    assert record["target_reached"] and record["relative_error"] <= 0.5 and 300 <= record["draws"] and record["n"] < 200
    assert record["arguments"]["nsamples"] == "all"
    calculate_hessian.main(flags(folder, "--target-relative-error", 0.0001, "--nsamples", 40, "--overwrite"))
    assert read(folder)["n"] == 40 and not read(folder)["target_reached"]
    assert "with all sentences; give a longer text or more draws" in capsys.readouterr().out


def without_times(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_repeated_measurement_is_the_same(setting):
    folder, table = setting
    records = []
    for _ in range(2):
        calculate_hessian.main(flags(folder, "--nsamples", 20, "--overwrite", **{"--condprobfile": table}))
        records.append(without_times(read(folder)))
    assert records[0] == records[1]


def close(found, wanted):
    """Records alike, numbers to 1e-6 of the larger one or of the record's own value."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        return all(close(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return found == pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else found == wanted


@pytest.mark.parametrize("launcher", ["torchrun", "batch"])
def test_neither_ranks_nor_batches_change_the_trace(setting, launcher):
    folder, table = setting
    more = ["--nsamples", 20, "--overwrite"]
    calculate_hessian.main(flags(folder, *more, **{"--condprobfile": table}))
    alone = without_times(read(folder))
    if launcher == "batch":
        calculate_hessian.main(flags(folder, *more, "--bs", 3, **{"--condprobfile": table}))
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        script = [Path(calculate_hessian.__file__), *flags(folder, *more, **{"--condprobfile": table})]
        done = subprocess.run([*start, *script], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": Fisher trace ") == 1
    together = without_times(read(folder))
    for name in ("value", "standard_error"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6)
        assert together["true_labels"][name] == pytest.approx(alone["true_labels"][name], rel=1e-6)
        assert together["hutchinson"][name] == pytest.approx(alone["hutchinson"][name], rel=1e-5)
    assert close(together, alone)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--positions", "0"], "0 is not 1 or more"),
        (["--target-relative-error", "1"], "1 is not above 0 and below 1"),
        (["--probe", "uniform"], "invalid choice: 'uniform'"),
        (["--draws", "none"], "invalid positive_int value: 'none'"),
    ],
)
def test_bad_flags(setting, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        calculate_hessian.main(flags(setting[0], *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_one_sentence_has_no_error(setting, monkeypatch):
    with pytest.raises(InputError, match="--nsamples: 1 sentence has no standard error"):
        calculate_hessian.main(flags(setting[0], "--nsamples", 1))
    for estimator in ("hutchinson", "both"):  # refused before Fisher's part is measured
        monkeypatch.setattr(hessian, "estimate_trace", None)
        with pytest.raises(InputError, match="--block-size 16: 10 sentences are one block, .*; give 5 or less"):
            calculate_hessian.main(flags(setting[0], "--nsamples", 10, "--estimator", estimator))


def test_what_the_numbers_are_taken_over_is_printed(setting, monkeypatch, capsys):
    monkeypatch.setattr(hessian, "COMPARED", 32)
    calculate_hessian.main(flags(setting[0], "--nsamples", 40, **{"--condprobfile": setting[1]}))
    own, *others = capsys.readouterr().out.splitlines()[-4:]
    assert "(mean over 40 sentences)" in own and "true conditionals" in others[1] and "on the same 40 sentences;" in others[1]
    assert (
        "(Hutchinson): " in others[2] and "on the first 32 of 40 sentences; Fisher minus Hutchinson, both on these" in others[2]
    )


@pytest.mark.parametrize(
    "more, named",
    [
        (["--probe-num", 8, "--eigenvalues", 2], "--eigenvalues, --probe-num"),
        (["--estimator", "hutchinson", "--min-draws", 5, "--block-size", 5, "--draws", 2], "--min-draws"),
        (["--target-relative-error", 0.5, "--min-draws", 5], None),
    ],
)
def test_flags_without_effect_are_named(setting, capsys, more, named):
    calculate_hessian.main(flags(setting[0], "--nsamples", 10, *more))
    printed = capsys.readouterr().out
    assert (f"here: {named}\n" in printed) if named else "no effect" not in printed


def test_rerun_seed_and_overwrite(setting, capsys):
    folder, _ = setting
    calculate_hessian.main(flags(folder, "--nsamples", 10))
    calculate_hessian.main(flags(folder, "--nsamples", 10))
    assert "skipped" in capsys.readouterr().out
    first = read(folder)["value"]
    with pytest.raises(InputError, match="seed was 0, now 1"):
        calculate_hessian.main(flags(folder, "--nsamples", 10, "--seed", 1))
    calculate_hessian.main(flags(folder, "--nsamples", 10, "--seed", 1, "--overwrite"))
    assert read(folder)["value"] != first


def test_samples_as_data(setting, tiny_samples):
    folder, _ = setting
    data = sample_paths(tiny_samples, "test")[0]
    calculate_hessian.main(flags(folder, "--nsamples", 12, **{"--datafile": data, "--vocabfile": folder / "vocab.txt"}))
    assert read(folder)["n"] == 12


def test_loadpath_measures_other_weights(setting):
    folder, _ = setting
    calculate_hessian.main(flags(folder, "--nsamples", 10))
    other = folder / "weights"
    other.mkdir()
    shutil.copy(folder / "models" / "step1" / "model.safetensors", other)
    model = {"--model-path": folder / "models" / "step1"}
    calculate_hessian.main(flags(folder, "--nsamples", 10, "--loadpath", other, **model))
    assert json.loads((other / "hessian.json").read_text())["value"] == read(folder)["value"]
    weights = folder / "models" / "step1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    for loadpath in ([], ["--loadpath", weights], ["--loadpath", weights.parent]):
        with pytest.raises(InputError, match="model.safetensors: damaged"):
            calculate_hessian.main(flags(folder, "--nsamples", 10, "--overwrite", *loadpath, **model))
    with pytest.raises(InputError, match="--loadpath .*nowhere"):
        calculate_hessian.main(flags(folder, "--loadpath", folder / "nowhere", **model))
    with pytest.raises(InputError, match="must be one model folder"):
        calculate_hessian.main(flags(folder, "--loadpath", other))


def test_the_spectrum(setting, capsys, monkeypatch):
    folder, table = setting
    more = ["--estimator", "spectrum", "--nsamples", 3, "--eigenvalues", 2, "--lanczos-steps", 4, "--probe-num", 2]
    for _ in range(2):
        calculate_hessian.main(flags(folder, *more, **{"--condprobfile": table}))
    record, printed = read(folder, "spectrum.json"), capsys.readouterr().out
    largest = [eigenvalue["value"] for eigenvalue in record["eigenvalues"]]
    assert record["value"] == largest[0] > largest[1] and record["loss"] == "exact" and record["n"] == 3
    assert record["arguments"]["lanczos_steps"] == 4 and "target_relative_error" not in record["arguments"]
    assert f"of the Hessian (loss: exact) {largest[0]:.4f}, {largest[1]:.4f} (residuals" in printed
    assert "largest eigenvalues move with the scale" in printed and "spectrum measured already, skipped" in printed
    with pytest.raises(InputError, match="eigenvalues was 2, now 3"):
        calculate_hessian.main(flags(folder, *more, "--eigenvalues", 3, **{"--condprobfile": table}))
    with pytest.raises(InputError, match="--target-relative-error: is for the trace"):
        calculate_hessian.main(flags(folder, *more, "--target-relative-error", 0.1))
    monkeypatch.setattr("pretraining.evaluation.spectrum.Ranks", lambda _: SimpleNamespace(size=2))
    with pytest.raises(InputError, match="--estimator spectrum: runs in one process, not in 2"):
        calculate_hessian.main(flags(folder, *more))
