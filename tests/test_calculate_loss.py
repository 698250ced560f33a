import errno
import json
import shutil

import pytest
import torch

import calculate_loss
import pcfg.lookup
from pcfg.common.files import InputError
from pcfg.common.text import read_texts
from pretraining.data.samples import sample_paths
from pretraining.evaluation import loss
from pretraining.evaluation.records import read_record
from pretraining.model.checkpoints import describe_model, load_model, load_vocabulary, save_model
from pretraining.report import __main__ as report
from pretraining.report.rows import collect
from tests.bert_tokenizer import build_tokenizer


@pytest.fixture
def setting(tiny_rules, tiny_data, tiny_model, tmp_path):
    """Two copies of a model under one folder, a text beside its vocabulary, and the text's lookup table."""
    for name in ("step1", "step2"):
        shutil.copytree(tiny_model, tmp_path / "models" / name)
    for name in ("test0.txt", "vocab.txt"):
        shutil.copy(tiny_data / name, tmp_path)
    table = tmp_path / "lookup.hdf5"
    pcfg.lookup.main(["--rule-path", str(tiny_rules), "--datafile", str(tmp_path / "test0.txt"), "--save-path", str(table)])
    return tmp_path, table


def flags(folder, **changes):
    given = {"--model-path": folder / "models", "--datafile": folder / "test0.txt", "--vocabfile": "vocab.txt", **changes}
    return [str(part) for pair in given.items() for part in pair]


def test_the_readmes_command(setting, capsys):
    folder, table = setting
    calculate_loss.main(flags(folder, **{"--condprobfile": table}))
    printed = capsys.readouterr().out
    for name in ("step1", "step2"):
        record = json.loads((folder / "models" / name / "loss.json").read_text())
        loss, entropy, gap = (record[key]["pairs"]["mean"] for key in ("loss", "entropy", "gap"))
        assert loss == pytest.approx(entropy + gap) and gap > 0.1
        assert float((folder / "models" / name / "loss.txt").read_text()) == pytest.approx(loss, abs=1e-6)
        assert record["sentences"] == len(read_texts(folder / "test0.txt")) and record["value"] == loss
    assert str(folder / "vocab.txt") in printed and "gap" in printed


def test_a_rerun_skips_and_other_inputs_are_refused(setting, tiny_rules, capsys):
    folder, table = setting
    calculate_loss.main(flags(folder, **{"--condprobfile": table}))
    before = (folder / "models" / "step1" / "loss.json").read_bytes()
    calculate_loss.main(flags(folder, **{"--condprobfile": table}))
    assert capsys.readouterr().out.count("skipped") == 2
    # the grammar's own conditionals are the same inputs
    calculate_loss.main(flags(folder, **{"--rule-path": tiny_rules}))
    assert (folder / "models" / "step1" / "loss.json").read_bytes() == before
    (folder / "test0.txt").write_text("\n\n".join(read_texts(folder / "test0.txt")[:50]) + "\n")
    with pytest.raises(InputError, match="was measured with other settings.*--overwrite"):
        calculate_loss.main(flags(folder, **{"--rule-path": tiny_rules}))
    calculate_loss.main([*flags(folder, **{"--rule-path": tiny_rules}), "--overwrite"])
    assert json.loads((folder / "models" / "step1" / "loss.json").read_text())["sentences"] == 50


def test_the_first_sentences_alone(setting, capsys):
    folder, table = setting
    calculate_loss.main(flags(folder, **{"--condprobfile": table, "--nsamples": 50}))
    printed = capsys.readouterr().out
    short = read_record(folder / "models" / "step1" / "loss.json")
    assert short.n == 50 and short.arguments == {"nsamples": 50}
    for mean in ("pairs", "sentences"):
        assert (
            f"{getattr(short.gap, mean).mean:.4f} +- {getattr(short.gap, mean).standard_error:.4f} (mean over {mean}" in printed
        )
    with pytest.raises(InputError, match="nsamples was 50, now None"):
        calculate_loss.main(flags(folder, **{"--condprobfile": table}))


def test_an_unwritable_folder_is_noticed_before_measuring(setting, monkeypatch, tmp_path):
    folder, table = setting
    given = flags(folder, **{"--condprobfile": table})
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("pcfg.common.files._sync", lambda _: (_ for _ in ()).throw(full))
        patch.setattr(loss, "load_model", None)
        with pytest.raises(
            InputError, match="models/step1/.probe-.*: the disk is full.*; --records-path writes the records elsewhere"
        ):
            calculate_loss.main(given)
    assert not list(folder.glob("models/*/.*")) and not list(folder.glob("models/*/loss*"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/step1/.probe-.*: can't be written .*--records-path"):
        calculate_loss.main([*given, "--records-path", str(tmp_path / "file")])
    records = tmp_path / "records"
    calculate_loss.main([*given, "--records-path", str(records)])
    assert sorted(path.name for path in records.iterdir()) == ["step1", "step2"]
    assert not list(folder.glob("models/*/loss*"))
    tree = collect(folder / "models", records)
    value = read_record(records / "step2" / "loss.json").gap.sentences.mean
    assert tree.measured.loc["step2", ("gap_sentences", "value")] == value
    report.main([str(folder / "models"), "--records-path", str(records), "--output", str(tmp_path / "report")])
    assert str(value)[:10] in (tmp_path / "report" / "results.csv").read_text()


def test_conditionals_from_the_grammar_or_the_table_agree(setting, tiny_rules):
    folder, table = setting
    values = []
    for truth in ({"--condprobfile": table}, {"--rule-path": tiny_rules}):
        calculate_loss.main([*flags(folder, **truth), "--overwrite"])
        values.append(json.loads((folder / "models" / "step1" / "loss.json").read_text())["gap"]["sentences"]["mean"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)  # the table is float32


def test_plain_loss_on_samples(setting, tiny_samples):
    folder, _ = setting
    data = sample_paths(tiny_samples, "test")[0]
    calculate_loss.main(flags(folder, **{"--datafile": data, "--vocabfile": folder / "vocab.txt"}))
    record = json.loads((folder / "models" / "step1" / "loss.json").read_text())
    assert "gap" not in record and record["value"] == record["sampled_loss"]["pairs"]["mean"] > 0


def test_the_vocabulary_beside_the_samples_folder_is_found(setting, tiny_samples, capsys):
    folder, _ = setting
    shutil.copytree(tiny_samples, folder / "pretraining")
    calculate_loss.main(flags(folder, **{"--datafile": sample_paths(folder / "pretraining", "test")[0]}))
    assert f"vocabulary: {folder / 'vocab.txt'}" in capsys.readouterr().out


def test_what_does_not_belong_together(setting, tiny_samples):
    folder, table = setting
    with pytest.raises(InputError, match="--condprobfile or --rule-path"):
        calculate_loss.main(flags(folder))
    with pytest.raises(InputError, match="no such file"):
        calculate_loss.main(flags(folder, **{"--datafile": folder / "nowhere.txt", "--condprobfile": table}))
    with pytest.raises(InputError, match="no such folder"):
        calculate_loss.main(flags(folder, **{"--model-path": folder / "nowhere", "--condprobfile": table}))
    samples = sample_paths(tiny_samples, "test")[0]
    with pytest.raises(InputError, match="not for the samples"):
        calculate_loss.main(
            flags(folder, **{"--datafile": samples, "--condprobfile": table, "--vocabfile": folder / "vocab.txt"})
        )
    (folder / "other.txt").write_text("cat dog\n")
    with pytest.raises(InputError, match="lookup.hdf5"):
        calculate_loss.main(flags(folder, **{"--datafile": folder / "other.txt", "--condprobfile": table}))
    words = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([*words, "zebra"]) + "\n")
    with pytest.raises(InputError, match="the model was trained with"):
        calculate_loss.main(flags(folder, **{"--condprobfile": table}))
    assert not list((folder / "models").rglob("loss*"))


def perturbed(folder, scale):
    """Change the weights of a model folder a little."""
    model = load_model(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    vocabulary = load_vocabulary(folder)
    save_model(folder, model, build_tokenizer(vocabulary, True, 10), vocabulary, {"job_name": "moved", "step": 7})


def read(path):
    return read_record(path).model_dump()


def compare(folder, first, second, *more, **truth):
    names = [str(folder / "models" / name) for name in (first, second)]
    calculate_loss.main(["--compare", *names, *flags(folder, **truth)[2:], *more])


def test_two_models_are_compared(setting, capsys):
    folder, table = setting
    truth = {"--condprobfile": table}
    perturbed(folder / "models" / "step2", 1e-3)
    compare(folder, "step1", "step2", **truth)
    assert "difference" in capsys.readouterr().out
    calculate_loss.main(flags(folder, **truth))
    gaps = [json.loads((folder / "models" / name / "loss.json").read_text())["gap"] for name in ("step1", "step2")]
    [path] = (folder / "models").rglob("comparison_*.json")
    assert path.parent.name == "step1"
    record = read(path)
    for mean in ("pairs", "sentences"):
        assert record["difference"][mean]["mean"] == pytest.approx(gaps[0][mean]["mean"] - gaps[1][mean]["mean"], abs=1e-9)
        assert record["gap_b"][mean]["mean"] == pytest.approx(gaps[1][mean]["mean"], rel=1e-9)
        assert 0 < record["difference"][mean]["standard_error"] < 0.1 * gaps[0][mean]["standard_error"]
    assert record["models"] == ["tiny step 0", "moved step 7"]
    assert record["inputs"]["other"] == describe_model(folder / "models" / "step2")

    before = path.read_bytes()
    compare(folder, "step1", "step2", **truth)
    assert "measured already, skipped" in capsys.readouterr().out and path.read_bytes() == before
    compare(folder, "step1", "step2", "--overwrite", **truth)
    again = json.loads(path.read_text())
    assert {**again, "seconds": 0} == {**record, "seconds": 0}


def test_all_models_are_compared_with_one(setting, capsys, monkeypatch):
    folder, table = setting
    perturbed(folder / "models" / "step2", 1e-3)
    shutil.copytree(folder / "models" / "step2", folder / "models" / "copy")
    shutil.copytree(folder / "models" / "step1", folder / "models" / "step3")
    perturbed(folder / "models" / "step3", 1e-2)
    truth, reference = {"--condprobfile": table}, folder / "models" / "step2"
    compare(folder, "step1", "step2", **truth)
    [single] = (folder / "models").rglob("comparison_*.json")
    alone = read(single)
    single.unlink()
    measured = []
    real = loss.load_model
    monkeypatch.setattr(loss, "load_model", lambda path, device: measured.append(path.name) or real(path, device))
    capsys.readouterr()
    calculate_loss.main([*flags(folder, **truth), "--compare-with", str(reference)])
    printed = capsys.readouterr().out
    assert f"{reference}: is the model to compare with, skipped" in printed
    assert measured == ["step2", "step1", "step3"]
    assert f"{folder / 'models' / 'copy'}: has the same weights as that model, skipped" in printed
    assert {**read(single), "seconds": 0} == {**alone, "seconds": 0}
    assert sorted(path.parent.name for path in (folder / "models").rglob("comparison_*.json")) == ["step1", "step3"]
    (folder / "models" / "step3" / single.name).unlink()
    calculate_loss.main([*flags(folder, **truth), "--compare-with", str(reference)])
    printed = capsys.readouterr().out
    assert f"{folder / 'models' / 'step1'}: comparison with {reference} is measured already, skipped" in printed
    assert (folder / "models" / "step3" / single.name).exists() and measured[3:] == ["step2", "step3"]


def test_what_can_not_be_compared(setting, tiny_samples):
    folder, table = setting
    with pytest.raises(InputError, match="the same weights"):
        compare(folder, "step1", "step2", **{"--condprobfile": table})
    with pytest.raises(InputError, match="nowhere: not a model folder"):
        compare(folder, "step1", "nowhere", **{"--condprobfile": table})
    with pytest.raises(SystemExit):
        calculate_loss.main([*flags(folder, **{"--condprobfile": table}), "--compare", "a", "b"])
    with pytest.raises(InputError, match="--compare-with nowhere: not a model folder"):
        calculate_loss.main([*flags(folder, **{"--condprobfile": table}), "--compare-with", "nowhere"])
    with pytest.raises(InputError, match="goes with --model-path"):
        compare(folder, "step1", "step2", "--compare-with", "x", **{"--condprobfile": table})
    perturbed(folder / "models" / "step2", 1e-3)
    samples = sample_paths(tiny_samples, "test")[0]
    compare(folder, "step1", "step2", **{"--datafile": samples, "--vocabfile": folder / "vocab.txt"})
    [path] = (folder / "models").rglob("comparison_*.json")
    assert {"difference", "loss_a", "loss_b"} < read(path).keys()


def test_a_repeated_measurement_is_the_same_but_for_its_time(setting):
    folder, table = setting
    path, records = folder / "models" / "step1" / "loss.json", []
    for more in ([], ["--overwrite"], ["--overwrite", "--batch-size", "3"]):
        calculate_loss.main([*flags(folder, **{"--condprobfile": table}), *more])
        records.append({**read(path), "seconds": 0})
    assert records[0] == records[1]
    assert records[2]["arguments"] == records[0]["arguments"]
    for part in ("loss", "gap", "sampled_loss"):
        assert records[2][part]["pairs"]["mean"] == pytest.approx(records[0][part]["pairs"]["mean"], rel=1e-6)


class Half:
    """One of two ranks, the second of which runs first: what it would send is added when the first one asks for it."""

    size, device = 2, torch.device("cpu")

    def __init__(self, rank, sent):
        self.rank, self.is_main, self.sent = rank, rank == 0, sent

    def sum_on_host(self, array):
        assert 0 < array.nonzero()[0].size < array.size
        if self.is_main:
            array += self.sent.pop(0)
        else:
            self.sent.append(array.copy())

    def close(self):
        pass


def test_two_ranks_share_the_work_and_one_writes_and_prints(setting, capsys, monkeypatch):
    folder, table = setting
    perturbed(folder / "models" / "step1", 0.1)
    given = flags(folder, **{"--condprobfile": table, "--batch-size": 50})
    record, rows = folder / "models" / "step1" / "loss.json", []
    commands = [given, ["--compare", *(str(folder / "models" / name) for name in ("step1", "step2")), *given[2:]]]
    for command in commands:
        calculate_loss.main(command)
    files = [record, *folder.glob("models/step1/comparison_*")]
    expected = [{**read(path), "seconds": 0} for path in files]
    printed = capsys.readouterr().out
    for command in commands:
        for rank in (1, 0):
            monkeypatch.setattr(loss, "Ranks", lambda _, rank=rank: Half(rank, rows))
            calculate_loss.main([*command, "--overwrite"])
            assert (rank == 0) == ("(mean over pairs" in (out := capsys.readouterr().out) or "difference" in out)
            printed = printed.replace(out, "") if rank == 0 else printed
    assert [{**read(path), "seconds": 0} for path in files] == expected and rows == [] and printed == ""


def test_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        calculate_loss.main(["--model-path", "x"])
    assert stopped.value.code == 2 and "--datafile" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_devices_that_are_not_there(device, capsys):
    with pytest.raises(SystemExit) as stopped:
        calculate_loss.main(["--model-path", "x", "--datafile", "y", "--vocabfile", "z", "--device", device])
    assert stopped.value.code == 2 and f"{device}: not a device of this machine" in capsys.readouterr().err
