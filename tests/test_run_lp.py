"""run_lp.py's main() on tiny models: the README's flags, records, skipping, the lookup table, and the errors."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import run_lp
from pcfg import lookup
from pcfg.common.files import InputError
from pcfg.common.text import read_texts, write_labelled
from pretraining.model.checkpoints import load_model, load_vocabulary, read_facts, save_model
from pretraining.report import __main__ as report
from tests.bert_tokenizer import build_tokenizer

# The README's flags; the test adds sizes.
README = """--tokenizer_name bert-large-uncased --max_seq_length 32 --do_train --do_eval --evaluation_strategy steps
    --per_device_train_batch_size 512 --gradient_accumulation_steps 1 --per_device_eval_batch_size 512 --learning_rate 1e-3
    --weight_decay 0.01 --eval_steps 200 --evaluation_strategy steps --max_grad_norm 1.0 --num_train_epochs 50
    --lr_scheduler_type polynomial --warmup_steps 50""".split()
SHORT = "--max_seq_length 12 --num_train_epochs 2 --learning_rate 1e-2".split()


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model folder whose tokenizer has the name of the README's commands."""
    vocabulary = load_vocabulary(tiny_model)
    tokenizer = build_tokenizer(vocabulary, True, 10)
    tokenizer.name_or_path = "bert-large-uncased"
    folder = tmp_path / "models" / "job" / "step0000000"
    save_model(folder, load_model(tiny_model), tokenizer, vocabulary, read_facts(tiny_model))
    return folder


@pytest.fixture
def data(tiny_data, tmp_path):
    """Labelled files: the class is that of the first word."""
    texts = list(dict.fromkeys(read_texts(tiny_data / "training0.txt")))
    classes = {word: index % 3 for index, word in enumerate(sorted({text.split()[0] for text in texts}))}
    labels = [classes[text.split()[0]] for text in texts]
    train, validation = tmp_path / "pcfg_B.csv", tmp_path / "pcfg_B_validation.csv"
    write_labelled(train, texts[:300], labels[:300])
    write_labelled(validation, texts[300:400], labels[300:400])
    return ["--train_file", str(train), "--validation_file", str(validation)]


def record_of(folder, name="probe_pcfg_B.json"):
    return json.loads((folder / name).read_text())


def test_readme_command(model, data, capsys):
    smaller = ["--num_train_epochs", "100", "--per_device_train_batch_size", "128"]
    run_lp.main(["--model_name_or_path", str(model), *data, *README, *smaller])
    record, n = record_of(model), 100
    assert record["measurement"] == "probe" and record["task"] == "pcfg_B" and record["n"] == n
    assert record["value"] > record["majority"] + 0.1
    assert record["standard_error"] is None and record["seeds"] == [0]
    assert "no standard error with one seed" in capsys.readouterr().out
    assert record["sampling_standard_error"] == pytest.approx((record["value"] * (1 - record["value"]) / n) ** 0.5)
    assert record["arguments"]["warmup_steps"] == 50 and record["arguments"]["lr_scheduler_type"] == "polynomial"
    assert set(record["inputs"]) == {"train", "validation", "model"}


def test_seeds_give_a_standard_error_and_the_report_shows_it(model, data, tmp_path, capsys):
    run_lp.main(["--model_name_or_path", str(tmp_path / "models"), *data, *SHORT, "--seeds", "0,1,2"])
    record = record_of(model)
    accuracies = record["accuracies"]
    assert record["value"] == pytest.approx(np.mean(accuracies)) and len(accuracies) == 3
    assert record["standard_error"] == pytest.approx(np.std(accuracies, ddof=1) / 3**0.5)
    report.main([str(tmp_path / "models")])
    shown = f"{100 * record['value']:.1f} ± {100 * record['standard_error']:.1f}"
    assert shown in capsys.readouterr().out


def test_finished_measurements_are_skipped(model, data, capsys):
    flags = ["--model_name_or_path", str(model), *data, *SHORT]
    run_lp.main(flags)
    first = record_of(model)
    run_lp.main(flags)
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="num_train_epochs was 2.0, now 3.0.*--overwrite"):
        run_lp.main([*flags, "--num_train_epochs", "3"])
    run_lp.main([*flags, "--overwrite"])
    again = record_of(model)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    run_lp.main([*flags, "--num_train_epochs", "3", "--overwrite"])
    assert record_of(model)["arguments"]["num_train_epochs"] == 3


def test_predicted_conditionals_of_a_model(model, data):
    run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, "--features", "conditional", "--solver", "adamw"])
    record = record_of(model, "probe_conditional_pcfg_B.json")
    assert record["features"] == "conditional" and not (model / "probe_pcfg_B.json").exists()


def test_lookup_table_from_rules_and_from_tables(data, tiny_rules, tmp_path, capsys):
    flags = [*data, *SHORT, "--features", "conditional", "--num_train_epochs", "60", "--solver", "adamw"]
    by_rules = tmp_path / "by_rules"
    run_lp.main([*flags, "--rule-path", str(tiny_rules), "--output_dir", str(by_rules)])
    tables = []
    for flag, part in (("--condprobfile_train", data[1]), ("--condprobfile_validation", data[3])):
        table = str(tmp_path / f"{flag}.h5")
        lookup.main(["--rule-path", str(tiny_rules), "--datafile", part, "--save-path", table])
        tables += [flag, table]
    by_tables = tmp_path / "by_tables"
    run_lp.main([*flags, *tables, "--output_dir", str(by_tables)])
    first, second = record_of(by_rules), record_of(by_tables)
    assert (by_rules / "args.json").read_bytes() == (by_tables / "args.json").read_bytes()
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["value"] > first["majority"]
    report.main([str(by_rules)])
    with open(by_rules / "report" / "results.csv") as file:
        [row] = csv.DictReader(file)
    assert row["kind"] == "lookup table" and float(row["gap_sentences"]) == 0.0
    capsys.readouterr()
    run_lp.main([*flags, "--rule-path", str(tiny_rules), "--output_dir", str(by_rules)])
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--solver", "lbfgs"], ["--pool", "mean"], ["--pool", "cls", "--solver", "lbfgs"]])
def test_solvers_and_pools_have_records_of_their_own(model, data, flags, capsys):
    name = "_".join(["probe", *(flag for flag in sorted(flags, key=("lbfgs", "mean", "cls").count) if flag[0] != "-")])
    name = {"probe_cls_lbfgs": "probe_lbfgs_cls"}.get(name, name)
    command = ["--model_name_or_path", str(model), *data, *SHORT, "--seeds", "0,1", *flags]
    run_lp.main(command)
    record = record_of(model, f"{name}_pcfg_B.json")
    assert not (model / "probe_pcfg_B.json").exists() and record["value"] > record["majority"] - 0.1
    is_optimum = "lbfgs" in flags
    assert ("learning_rate" in record["arguments"]) != is_optimum
    assert ("probe by lbfgs: --learning_rate" in capsys.readouterr().out) == is_optimum  # it has no effect, which is said
    if is_optimum:
        assert record["excess_nats"] < 1e-5 and len(record["strengths"]) == 2
    run_lp.main(command)
    assert "skipped" in capsys.readouterr().out
    run_lp.main([*command, "--overwrite"])
    assert {**record, "seconds": 0} == {**record_of(model, f"{name}_pcfg_B.json"), "seconds": 0}


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_bootstrap(model, data, solver, capsys):
    command = ["--model_name_or_path", str(model), *data, *SHORT, "--solver", solver, "--bootstrap", "30"]
    run_lp.main(command)
    record = record_of(model, f"probe{'' if solver == 'adamw' else '_lbfgs'}_pcfg_B.json")
    errors = record["bootstrap"]
    assert errors["replicates"] == 30 == record["arguments"]["bootstrap"]
    # 30 replicates: the error of an error is 13%
    assert errors["validation_standard_error"] == pytest.approx(record["sampling_standard_error"], rel=0.5)
    assert 0 < errors["training_standard_error"] < 0.2 and 0 < errors["standard_error"] < 0.2
    assert "over 30 samples of the data" in capsys.readouterr().out


def test_lookup_table_takes_the_same_options(data, tiny_rules, tmp_path):
    flags = [*data, *SHORT, "--features", "conditional", "--rule-path", str(tiny_rules), "--output_dir", str(tmp_path / "out")]
    run_lp.main([*flags, "--solver", "lbfgs", "--pool", "mean", "--bootstrap", "3", "--max_train_samples", "100"])
    record = record_of(tmp_path / "out", "probe_lbfgs_mean_pcfg_B.json")
    assert record["value"] > record["majority"] and record["train_n"] == 100 and record["bootstrap"]["replicates"] == 3
    run_lp.main([*flags, "--max_train_samples", "100"])  # by lbfgs, the default for conditionals
    tables = []
    for flag, part in (("--condprobfile_train", data[1]), ("--condprobfile_validation", data[3])):
        lookup.main(["--rule-path", str(tiny_rules), "--datafile", part, "--save-path", str(tmp_path / f"{flag}.h5")])
        tables += [flag, str(tmp_path / f"{flag}.h5")]
    start = [*data, *SHORT, "--features", "conditional", *tables, "--output_dir", str(tmp_path / "out2")]
    run_lp.main([*start, "--max_train_samples", "100"])
    first, second = (record_of(tmp_path / out, "probe_lbfgs_pcfg_B.json") for out in ("out", "out2"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


CURVE = ["--label-counts", "40,20", "--label-draws", "3"]


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_curves_of_models_and_controls(model, data, tiny_rules, tmp_path, solver, capsys):
    """Records of all kinds of features, on the same draws; measured once."""
    start = [*data, "--max_seq_length", "12", "--solver", solver, *CURVE]
    kinds = {
        model: ["--model_name_or_path", str(tmp_path / "models")],
        tmp_path / "words": ["--features", "words", "--output_dir", str(tmp_path / "words")],
        tmp_path / "table": [
            *("--features", "conditional", "--rule-path", str(tiny_rules)),
            *("--output_dir", str(tmp_path / "table")),
        ],
    }
    for folder, flags in kinds.items():
        run_lp.main([*start, *flags])
        record = record_of(folder, f"curve_pcfg_B_{solver}.json")
        assert [point["labels"] for point in record["points"]] == [20, 40] and record["points"][0]["draws"] == 3
        assert record["value"] == record["points"][1]["accuracy"]["mean"] and record["task"] == "pcfg_B"
        assert record["solver"] == solver and record["seeds"] == [] and record["n"] == 100
        assert ("model" in record["inputs"]) == (folder.name != "words")
    printed = capsys.readouterr().out
    assert f"curve pcfg_B by {solver}: " in printed and "means over 3 draws; majority" in printed
    deviation = record["points"][1]["accuracy"]["standard_error"] * 3**0.5
    assert f"with 40 labels (standard deviation between draws {100 * deviation:.2f}); means" in printed
    # The class is that of the first word: one-hot words tell it once each word has been seen.
    words = record_of(tmp_path / "words", f"curve_pcfg_B_{solver}.json")
    assert words["value"] > 0.9 > words["majority"] and words["features"] == "words"
    for folder, flags in kinds.items():
        run_lp.main([*start, *flags])
        assert f"{folder}: curve_pcfg_B_{solver}.json is measured already" in capsys.readouterr().out
    with pytest.raises(InputError, match="label_draws was 3, now 4.*--overwrite"):
        run_lp.main([*start, *kinds[model], "--label_draws", "4"])


def test_ridge_on_the_whole_file_layers_and_positions(model, data):
    start = ["--model_name_or_path", str(model), *data, "--max_seq_length", "12", "--solver", "ridge"]
    run_lp.main([*start, "--bootstrap", "3"])
    record = record_of(model, "probe_ridge_pcfg_B.json")
    assert record["value"] > record["majority"] and len(record["strengths"]) == 1 == len(record["accuracies"])
    assert record["bootstrap"]["training_standard_error"] > 0 and "learning_rate" not in record["arguments"]
    run_lp.main([*start, "--layer", "0", "--position", "1"])  # the class is that of the first word
    record = record_of(model, "probe_ridge_layer0_position1_pcfg_B.json")
    assert record["value"] == 1 and record["arguments"]["layer"] == 0 and record["arguments"]["position"] == 1
    run_lp.main([*start, *CURVE, "--layer", "0", "--position", "1"])
    record = record_of(model, "curve_layer0_position1_pcfg_B_ridge.json")
    assert (record["layer"], record["position"], record["pool"]) == (0, 1, "concat") and record["value"] > 0.95


def test_words_of_natural_text_are_cut_and_pairs_are_joined(tmp_path):
    """The answer says the class, and --max_seq_length leaves room for its first word or not."""
    for part, number in (("train", 20), ("validation", 10)):
        rows = [f"what is it ?\t{'yes' if n % 2 else 'no'} it is\t{n % 2}" for n in range(number)]
        (tmp_path / f"{part}.tsv").write_text("question\tsentence\tlabel\n" + "\n".join(rows) + "\n")
    files = [f"--{part}_file={tmp_path / part}.tsv" for part in ("train", "validation")]
    accuracies = {}
    for tokens in (7, 8):  # [CLS], 4 words and [SEP] of the question, the first word of the answer, [SEP]
        out = tmp_path / str(tokens)
        flags = ["--task_name", "qnli", *files, "--max_seq_length", str(tokens), "--output_dir", str(out)]
        run_lp.main(["--features", "words", *flags])
        accuracies[tokens] = record_of(out, "probe_lbfgs_qnli.json")["value"]  # the default solver of words
    assert accuracies == {7: 0.5, 8: 1.0}
    with pytest.raises(InputError, match="belongs to another model or grammar"):
        (tmp_path / "8" / "args.json").write_text('{"model": "lookup table"}')
        run_lp.main(["--features", "words", *flags])


def test_unfinished_probes_are_marked(model, data, capsys):
    start = ["--model_name_or_path", str(model), *data, "--max_seq_length", "12"]
    run_lp.main([*start, "--learning_rate", "1e-3", "--num_train_epochs", "2", "--seeds", "0,1"])
    record = record_of(model)
    assert record["unfinished"] == 2 and len(record["gradient_norms"]) == 2
    assert "warning: the training loss still falls, by 0." in capsys.readouterr().out
    flags = ["--learning_rate", "1e-1", "--num_train_epochs", "300", "--per_device_train_batch_size", "300", "--overwrite"]
    run_lp.main([*start, *flags])
    assert record_of(model)["unfinished"] == 0 and record_of(model)["gradient_norms"][0] < record["gradient_norms"][0] / 5
    assert "still falls" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ([*CURVE], "--label-counts: adamw's steps"),
        ([*CURVE, "--solver", "ridge", "--bootstrap", "3"], "--bootstrap 3: is for one training file"),
        ([*CURVE, "--solver", "ridge", "--label-draws", "1"], "--label-draws 1: give 2"),
        ([*CURVE, "--solver", "lbfgs", "--seeds", "0,1"], "--seeds 0,1: only --label-draws"),
        (["--solver", "ridge", "--seeds", "0"], "--seeds 0: "),
        (["--solver", "ridge", "--label-counts", "50,301"], "--label_counts: '50,301'; give distinct integers from 2 to 300"),
        (["--layer", "0", "--features", "conditional"], "--layer 0: only hidden states"),
        (["--layer", "9"], "--layer 9: the model has"),
        (["--position", "0"], "--position 0: give the number of a word"),
        (["--position", "2", "--pool", "mean"], "--position 2"),
        (["--position", "50"], "pcfg_B.csv: sentence .* --position [0-9] or less"),
        (["--features", "words"], "what is probed"),
        (["--bootstrap", "1"], "--bootstrap 1: give 2 or more"),
        (["--bootstrap", "-5"], "--bootstrap -5"),
        (["--features", "conditional", "--pool", "cls"], "--pool cls"),
        (["--max_train_samples", "4", "--solver", "lbfgs"], "too few to hold some out"),
    ],
)
def test_options_that_make_no_sense(model, data, flags, message):
    with pytest.raises(InputError, match=message):
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, *flags])


def test_lookup_table_errors(data, model, tiny_rules, tmp_path):
    base = [*data, *SHORT]
    rules, out = ["--rule-path", str(tiny_rules)], ["--output_dir", str(tmp_path / "out")]
    conditional = ["--features", "conditional"]
    for flags, message in (
        ([], "what is probed"),
        ([*conditional, *rules, *out, "--model_name_or_path", str(model)], "what is probed"),
        ([*rules, *out], "has no hidden states"),
        ([*conditional, *rules], "--output_dir"),
        ([*conditional, *rules, *out, "--task_name", "qnli"], "--task_name: a lookup table"),
        ([*conditional, "--condprobfile_train", "x.h5", *out], "both --condprobfile_train and"),
        ([*conditional, *rules, "--output_dir", str(model)], "holds a model"),
        ([*conditional, *rules, *out, "--max_seq_length", "4"], "--max_seq_length 1?[0-9] or more, not 4"),
    ):
        with pytest.raises(InputError, match=message):
            run_lp.main([*base, *flags])
    other = tmp_path / "other.txt"
    other.write_text("S A A 1.0\nA cat 1.0\n")
    run_lp.main([*base, *conditional, *rules, *out])
    with pytest.raises(InputError, match="another model or grammar"):
        run_lp.main([*base, *conditional, "--rule-path", str(other), *out])
    table = tmp_path / "table.h5"
    lookup.main([*rules, "--datafile", data[3], "--save-path", str(table)])
    both = ["--condprobfile_train", str(table), "--condprobfile_validation", str(table)]
    with pytest.raises(InputError):
        run_lp.main([*base, *conditional, *both, "--output_dir", str(tmp_path / "out2")])


def rewrite(data, tmp_path, text, part=1):
    """The data flags with one of the files replaced."""
    path = tmp_path / "other.csv"
    path.write_text(text)
    return [*data[:part], str(path), *data[part + 1 :]]


def test_data_errors(model, data, tmp_path):
    start = ["--model_name_or_path", str(model), *SHORT]
    for text, message in (
        ("text\ncat\n", "label"),
        ("text,label\ncat dog,one\n", "one"),
        ("text,label\ncat dog,1\nbird cat,1\n", "at least 2 classes"),
        ("text,label\ncat dog,1\nbird mouse,0\n", "mouse"),
        ("text,label\ncat dog,1\n" + "cat " * 11 + ",0\n", "sentence 2 has 11 words.*--max_seq_length 13"),
    ):
        with pytest.raises(InputError, match=message):
            run_lp.main([*start, *rewrite(data, tmp_path, text)])
    with pytest.raises(InputError, match="missing.csv"):
        run_lp.main([*start, "--train_file", str(tmp_path / "missing.csv"), *data[2:]])
    # room for the features, but no such position in the model's table (10 positions)
    long = rewrite(data, tmp_path, "text,label\ncat dog,1\n" + "cat " * 9 + ",0\n")
    with pytest.raises(InputError, match="other.csv: .*max_position_embeddings 11 or more, not 10"):
        run_lp.main([*start, *long])


def test_overlap_and_unseen_labels_are_counted(model, data, tmp_path, capsys):
    lines = open(data[1]).read().splitlines()[1:4]
    text = "text,label\n" + "\n".join(lines) + "\ncat river,77\n"
    run_lp.main(["--model_name_or_path", str(model), *SHORT, *rewrite(data, tmp_path, text, part=3)])
    printed = capsys.readouterr().out
    assert "3 of 4 sentences" in printed and "1 of 4 sentences" in printed
    assert record_of(model)["overlap"] == 3


def test_model_errors(model, data, tmp_path):
    with pytest.raises(InputError, match="bert-base-uncased"):
        run_lp.main(["--model_name_or_path", "bert-base-uncased", *data, *SHORT])
    with pytest.raises(InputError, match="tokenizer roberta-nowhere"):
        run_lp.main(["--model_name_or_path", str(model), "--tokenizer_name", "roberta-nowhere", *data, *SHORT])
    with pytest.raises(InputError, match="--warmup_steps 76.*76 steps"):
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, "--warmup_steps", "76"])
    with pytest.raises(InputError, match="--seeds"):
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, "--seeds", "0,0"])
    other = tmp_path / "tokenizer"
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary, save_tokenizer

    small = Vocabulary([*SPECIAL_TOKENS, "cat"])
    save_tokenizer(other, build_tokenizer(small, True, 10), small)
    with pytest.raises(InputError, match="6 words are not the"):
        run_lp.main(["--model_name_or_path", str(model), "--tokenizer_name", str(other), *data, *SHORT])


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--num_train_epochs", "many"],
        ["--do_train", "false"],
        ["--save_strategy", "epoch"],
        ["--max_seq_length", "2"],
        *(["--learning_rate", "-1"], ["--learning_rate", "nan"], ["--weight_decay", "nan"], ["--max_grad_norm", "inf"]),
        *(["--num_train_epochs", "nan"], ["--adam_beta1", "1"], ["--per_device_eval_batch_size", "0"], ["--eval_steps", "0"]),
        *(["--solver", "sgd"], ["--pool", "max"], ["--max_train_samples", "1"]),
        *(["--gradient_accumulation_steps", "0"], ["--per_device_train_batch_size", "-2"], ["--seed", "-1"]),
    ],
)
def test_usage_errors_exit_with_2(model, data, flags):
    with pytest.raises(SystemExit) as stopped:
        run_lp.main(["--model_name_or_path", str(model), *data, *flags])
    assert stopped.value.code == 2


def test_flags_without_effect_are_named(model, data, capsys):
    run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, "--label_smoothing_factor", "0.1"])
    assert "no effect on a linear probe: --label_smoothing_factor\n" in capsys.readouterr().out
    given = ["--seed", "3", "--seeds", "0,1,2", "--label_draws", "3", "--output_dir", "x", "--overwrite"]
    run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, *given])
    printed = capsys.readouterr().out
    assert "no effect on a linear probe: --label_draws, --output_dir, --seed\n" in printed
    record = record_of(model)
    deviation = np.std(record["accuracies"], ddof=1)
    assert f"95% by Student's t ± {100 * 4.302653 * deviation / 3**0.5:.2f}" in printed  # t of 2 degrees of freedom


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
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT])
    assert not list(model.glob("probe*"))


def test_records_elsewhere(model, data, tmp_path):
    root = model.parents[1]
    run_lp.main(["--model_name_or_path", str(root), *data, *SHORT, "--records-path", str(tmp_path / "records")])
    assert (tmp_path / "records" / model.relative_to(root) / "probe_pcfg_B.json").exists() and not list(model.glob("probe*"))


def test_a_diverged_training_is_no_accuracy(model, data):
    with pytest.raises(InputError, match="diverged.*nothing is recorded, lower --learning_rate"):
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, "--learning_rate", "1e30"])
    assert not list(model.glob("probe*"))


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_lp.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--evaluation_strategy" in printed and "model and data" in printed
    assert "Estimator: " in printed and "Liu et al. 2023" in printed


@pytest.mark.parametrize(
    "flags, named",
    [(["--num_train_epochs", "0"], "no training step"), (["--seeds", "x"], "'x'"), (["--seeds", str(1 << 32)], "4294967295")],
)
def test_trainings_that_are_none(model, data, flags, named):
    with pytest.raises(InputError, match=named):
        run_lp.main(["--model_name_or_path", str(model), *data, *SHORT, *flags])
