import json
import shutil

import pytest

import calculate_hessian
import pcfg.lookup
from pcfg.artefacts import InputError
from pretraining.data.samples import sample_paths


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


def test_the_readmes_command(setting):
    folder, table = setting
    calculate_hessian.main(flags(folder, "--nsamples", 20, **{"--condprobfile": table}))
    record = read(folder)
    assert record["estimator"] == "fisher" and record["n"] == 20 and record["standard_error"] > 0
    assert record["left_out"] == ["decoder_bias"] and record["draws"] >= 2 * 20
    assert float((folder / "models" / "step1" / "hessian.txt").read_text()) == pytest.approx(record["value"], abs=1e-5)


def test_hutchinson_beside_fisher(setting):
    folder, table = setting
    calculate_hessian.main(flags(folder, "--nsamples", 24, "--bs", 8, "--estimator", "hutchinson", **{"--condprobfile": table}))
    record = read(folder, "hessian_hutchinson.json")
    assert record["n"] == 3 and record["draws"] == 12
    calculate_hessian.main(flags(folder, "--nsamples", 5))
    assert read(folder)["estimator"] == "fisher"


def test_the_batch_size_does_not_change_the_trace(setting):
    folder, _ = setting
    values = []
    for size in (1, 64):
        calculate_hessian.main(flags(folder, "--nsamples", 10, "--bs", size, "--overwrite"))
        values.append(read(folder)["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


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
    with pytest.raises(InputError, match="--loadpath .*nowhere"):
        calculate_hessian.main(flags(folder, "--loadpath", folder / "nowhere", **model))
    with pytest.raises(InputError, match="must be one model folder"):
        calculate_hessian.main(flags(folder, "--loadpath", other))
