"""run_ft.py's main() on a tiny model: the README's flags, the record, skipping, and the errors."""

import json
import math

import pytest
from safetensors.torch import load_file, save_file

import run_ft
from pcfg.common.files import InputError
from pcfg.common.text import read_texts, write_labelled
from pretraining.model.checkpoints import load_model, load_vocabulary, read_facts, save_model
from tests.bert_tokenizer import build_tokenizer

# The README's flags; the test adds fewer epochs.
README = """--tokenizer_name bert-large-uncased --max_seq_length 32 --do_train --do_eval --evaluation_strategy steps
    --per_device_train_batch_size 128 --gradient_accumulation_steps 1 --per_device_eval_batch_size 128 --learning_rate 1e-4
    --weight_decay 0.01 --eval_steps 200 --evaluation_strategy steps --max_grad_norm 1.0 --num_train_epochs 50
    --lr_scheduler_type polynomial --warmup_steps 50""".split()
SHORT = "--max_seq_length 12 --max_steps 3 --disable_tqdm true".split()


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model folder whose tokenizer has the name of the README's command."""
    vocabulary = load_vocabulary(tiny_model)
    tokenizer = build_tokenizer(vocabulary, True, 10)
    tokenizer.name_or_path = "bert-large-uncased"
    folder = tmp_path / "models" / "job" / "step0000000"
    save_model(folder, load_model(tiny_model), tokenizer, vocabulary, read_facts(tiny_model))
    return folder


@pytest.fixture
def data(tiny_data, tmp_path):
    """Labelled files: the class is that of the first word, labels 4, 7 and 9."""
    texts = list(dict.fromkeys(read_texts(tiny_data / "training0.txt")))
    classes = {word: (4, 7, 9)[index % 3] for index, word in enumerate(sorted({text.split()[0] for text in texts}))}
    labels = [classes[text.split()[0]] for text in texts]
    train, validation = tmp_path / "pcfg_B.csv", tmp_path / "pcfg_B_validation.csv"
    write_labelled(train, texts[:300], labels[:300])
    write_labelled(validation, texts[300:400], labels[300:400])
    return ["--train_file", str(train), "--validation_file", str(validation)]


def record_of(folder):
    return json.loads((folder / "finetune_pcfg_B.json").read_text())


def test_readme_command(model, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in model.iterdir()} | {"finetune_pcfg_B.json"}
    run_ft.main(["--model_name_or_path", str(model), *data, *README, "--num_train_epochs", "20", "--warmup_steps", "5"])
    record = record_of(model)
    assert (record["measurement"], record["task"], record["n"], record["classes"]) == ("finetune", "pcfg_B", 100, 3)
    assert record["best_accuracy"] >= record["value"] > record["majority"] - 0.1
    assert record["train_accuracies"][0] > record["majority"]
    # nothing but the record is left: no checkpoints, no trainer_output in the working directory
    assert {path.name for path in model.iterdir()} == before
    assert not (tmp_path / "trainer_output").exists()


def test_seeds_are_reproducible_and_finished_ones_skipped(model, data, capsys):
    flags = ["--model_name_or_path", str(model.parent.parent), *data, *SHORT, "--seeds", "3,4"]
    run_ft.main(flags)
    first = record_of(model)
    assert len(first["accuracies"]) == 2 and first["standard_error"] is not None
    run_ft.main(flags)
    assert "skipped" in capsys.readouterr().out
    run_ft.main([*flags, "--overwrite", "--logging_steps", "1"])
    assert {**first, "seconds": 0} == {**record_of(model), "seconds": 0}
    with pytest.raises(InputError, match="--overwrite"):
        run_ft.main([*flags, "--label_smoothing_factor", "0.1"])


def test_one_seed_says_that_there_is_no_error(model, data, capsys):
    run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, "--seed", "7"])
    assert record_of(model)["seeds"] == [7] and record_of(model)["standard_error"] is None
    printed = capsys.readouterr().out
    assert "no standard error with one seed" in printed
    value, z = record_of(model)["value"], 1.959964
    ends = [
        (value + z * z / 200 + sign * z * (value * (1 - value) / 100 + z * z / 40000) ** 0.5) / (1 + z * z / 100)
        for sign in (-1, 1)
    ]
    assert "95% by Wilson for 100 sentences {:.2f} to {:.2f}".format(*(100 * end for end in ends)) in printed


def test_flags_without_effect_are_named(model, data, capsys):
    extra = ["--resume_from_checkpoint", "x", "--prediction_loss_only", "true", "--seed", "1", "--seeds", "2"]
    run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, *extra])
    assert "no effect on fine-tuning: --prediction_loss_only, --resume_from_checkpoint, --seed\n" in capsys.readouterr().out
    assert record_of(model)["seeds"] == [2]
    with pytest.raises(SystemExit) as stopped:
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, "--push_to_hub"])
    assert stopped.value.code == 2 and "--push_to_hub: a measurement keeps no model" in capsys.readouterr().err


def test_predictions_of_a_test_file(model, data, tmp_path, capsys):
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "\n".join(open(data[3]).read().splitlines()[1:21]) + "\n")
    flags = ["--model_name_or_path", str(model), *data, *SHORT, "--seeds", "0,1"]
    predict = [*flags, "--do_predict", "--test_file", str(test)]
    run_ft.main(predict)
    record, file = record_of(model), model / "finetune_pcfg_B_predictions.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == "text,seed_0,seed_1" and len(lines) == 21
    texts, *predicted = zip(*(line.split(",") for line in lines[1:]), strict=True)
    expected, labels = zip(*(line.split(",") for line in test.read_text().splitlines()[1:]), strict=True)
    assert texts == expected and set(predicted[0]) <= {"4", "7", "9"}
    shares = [sum(map(str.__eq__, column, labels)) / 20 for column in predicted]
    assert record["test_accuracies"] == pytest.approx(shares) and record["test_n"] == 20
    assert record["predictions_file"] == file.name and set(record["inputs"]) == {"train", "validation", "test", "model"}
    run_ft.main(predict)
    assert "skipped" in capsys.readouterr().out
    before = file.read_bytes()
    file.unlink()
    run_ft.main(predict)
    assert file.read_bytes() == before and {**record, "seconds": 0} == {**record_of(model), "seconds": 0}
    with pytest.raises(InputError, match="test was .*--overwrite"):
        run_ft.main(flags)


def test_a_glue_task_from_files(model, tmp_path, capsys):
    """Pairs of sentences, one of them too long, with a word that the model does not know."""
    rows = [("cat dog", "bird", "entailment"), ("dog", "bird mouse", "not_entailment"), ("cat " * 9, "dog", "0")] * 10
    for name in ("train", "dev"):
        lines = ["question\tsentence\tlabel", *("\t".join(row) for row in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    files = ["--train_file", str(tmp_path / "train.tsv"), "--validation_file", str(tmp_path / "dev.tsv")]
    flags = ["--model_name_or_path", str(model), "--task_name", "qnli", *files, *SHORT, "--do_predict"]
    run_ft.main([*flags, "--test_file", str(tmp_path / "dev.tsv")])
    printed = capsys.readouterr().out
    assert "10 of 30 rows of" in printed and "are [UNK]" in printed and "30 of 30 sentences of" in printed
    record = json.loads((model / "finetune_qnli.json").read_text())
    assert record["task"] == "qnli" and record["n"] == 30 and record["classes"] == 2
    assert (model / "finetune_qnli_predictions.csv").read_text().splitlines()[1].startswith("cat dog,bird,")


def test_early_stopping_and_fewer_sentences(model, data):
    flags = ["--model_name_or_path", str(model), *data, "--max_seq_length", "12", "--disable_tqdm", "true"]
    stop = ["--early_stopping_patience", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "1e-12"]
    run_ft.main([*flags, *stop, "--max_train_samples", "50"])
    record = record_of(model)
    assert record["steps"] == [3] and record["train_n"] == 50
    assert record["arguments"]["early_stopping_patience"] == 2 and record["arguments"]["max_train_samples"] == 50


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--early_stopping_patience", "2"], "give --eval_strategy"),
        (["--early_stopping_patience", "0", "--eval_strategy", "epoch"], "--early_stopping_patience 0"),
        (["--test_file", "test.csv"], "give --do_predict"),
        (["--do_predict"], "--test_file: give the file"),
        (["--do_predict", "--test_file", "missing.csv"], "missing.csv: no such file"),
        (["--task_name", "stsb"], "--task_name stsb"),
    ],
)
def test_flags_that_belong_together(model, data, flags, message):
    with pytest.raises(InputError, match=message):
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, *flags])


def test_a_glue_task_by_name_needs_the_hub(model, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match="--task_name sst2: .* is not in the hub's local cache"):
        run_ft.main(["--model_name_or_path", str(model), "--task_name", "sst2", *SHORT])


def spoil(model, name, value):
    """Set the first entry of a weight of a model folder without hashes."""
    (model / "args.json").unlink()
    weights = load_file(model / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, model / "model.safetensors")


@pytest.mark.parametrize("name, value", [("lm_head.bias", math.nan), ("roberta_prelayernorm.LayerNorm.bias", 3e38)])
def test_what_is_not_finite_is_no_accuracy(model, data, name, value):
    spoil(model, name, value)
    with pytest.raises(InputError, match="not finite|diverged"):
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT])
    assert not list(model.glob("finetune*"))


def test_records_elsewhere(model, data, tmp_path):
    root = model.parents[1]
    run_ft.main(["--model_name_or_path", str(root), *data, *SHORT, "--records-path", str(tmp_path / "records")])
    assert (tmp_path / "records" / model.relative_to(root) / "finetune_pcfg_B.json").exists() and not list(
        model.glob("finetune*")
    )


def test_a_diverged_training_is_no_accuracy(model, data):
    with pytest.raises(InputError, match="diverged.*nothing is recorded, lower --learning_rate"):
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, "--learning_rate", "1e30"])
    assert not list(model.glob("finetune*"))


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_ft.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "Estimator: " in printed and "Devlin et al. 2019" in printed


def test_errors(model, data, tmp_path):
    with pytest.raises(InputError, match="--model_name_or_path"):
        run_ft.main([*data, *SHORT])
    with pytest.raises(InputError, match="bert-large-uncased"):
        run_ft.main(["--model_name_or_path", "bert-large-uncased", *data, *SHORT])
    with pytest.raises(InputError, match="--warmup_steps 3: the training has 3 steps"):
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, "--warmup_steps", "3"])
    with pytest.raises(InputError, match="--max_seq_length"):
        run_ft.main(["--model_name_or_path", str(model), *data, *SHORT, "--max_seq_length", "4"])
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\ncat dog,1\nbird mouse,0\n")
    with pytest.raises(InputError, match="mouse"):
        run_ft.main(["--model_name_or_path", str(model), "--train_file", str(bad), *data[2:], *SHORT])
    assert not (model / "finetune_pcfg_B.json").exists()


@pytest.mark.parametrize("flags", [["--no_such_flag"], ["--learning_rate", "fast"], ["--save_strategy", "steps"]])
def test_usage_errors_exit_with_2(model, data, flags):
    with pytest.raises(SystemExit) as stopped:
        run_ft.main(["--model_name_or_path", str(model), *data, *flags])
    assert stopped.value.code == 2
