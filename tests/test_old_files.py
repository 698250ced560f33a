"""Files written before format or schema changes are read with the right values, or refused with the command that makes them.

fixtures/version1.tar.gz holds every kind of file that the scripts write; fixtures/version1.sh has the commands.
"""

import contextlib
import csv
import io
import runpy
import shlex
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import calculate_hessian
import calculate_loss
import generate_downstream
import generate_pretraining
import generate_samples
import run_ft
import run_lp
import run_pretraining
from pcfg import lookup
from pcfg.common.files import InputError, read_json
from pcfg.common.text import read_texts
from pcfg.lookup import LookupTable
from pretraining.data.samples import DTYPES, read_samples
from pretraining.model import checkpoints
from pretraining.training.metrics import read_metrics

ARCHIVE = Path(__file__).parent / "fixtures" / "version1.tar.gz"
RULES = "rule_mini_mlm.txt"
MODEL = "models/finished/step0000006"
TEXT = f"--rule-path {RULES} --save-path data --length-limit 12"
CORPUS = "--source corpus --dataset input/texts.txt --save-path corpus --shard-num 1 --test-shard-num 1 --test-fraction 0.3"
TRAIN = (
    "--dataset_path data/pretraining --tokenizer_name bert-large-uncased --hidden_size 8 --num_hidden_layers 1 "
    "--num_attention_heads 2 --intermediate_size 16 --hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --lr 1e-2 "
    "--train_batch_size 16 --train_micro_batch_size_per_gpu 8 --lr_schedule step --print_steps 2 --output_dir models "
    f"--report_to none --do_validation --rule-path {RULES}"
)
MEASURED = "--datafile data/test0.txt --vocabfile vocab.txt --condprobfile data/lookup_float32.hdf5"
TASK = (
    "--train_file data/pcfg_B.csv --validation_file data/pcfg_B_validation.csv --max_seq_length 13 --do_train --do_eval "
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 16 --num_train_epochs 2 --learning_rate 1e-2"
)
PROBE = f"{TASK} --model_name_or_path {MODEL} --tokenizer_name bert-large-uncased"
# Rows, and sums of the five arrays in the order of DTYPES.
SAMPLES = {
    "data/pretraining/train_shard_0.hdf5": (40, 3849, 394, 0, 177, 519),
    "data/pretraining/train_shard_1.hdf5": (40, 4137, 398, 0, 180, 548),
    "data/pretraining/test_shard_0.hdf5": (24, 2516, 240, 0, 128, 302),
    "data/several/train_shard_0.hdf5": (40, 3719, 394, 0, 322, 962),
    "data/several/train_shard_3.hdf5": (40, 3784, 398, 0, 350, 1130),
    "data/several/test_shard_1.hdf5": (24, 2373, 240, 0, 202, 672),
    "corpus/pretraining/train_shard_0.hdf5": (47, 66592, 1281, 0, 2809, 12175),
    "corpus/pretraining/test_shard_0.hdf5": (16, 20333, 434, 0, 1052, 3280),
}
# The commands that wrote the files.
RERUNS = {
    "text": (
        generate_pretraining,
        f"{TEXT} --sentence-num 40 --shard-num 2 --test-shard-num 1 --test-sentence-num 24 --seed 3",
    ),
    "corpus": (generate_pretraining, f"{CORPUS} --vocab-size 120"),
    "samples": (generate_samples, "--dir data -o data/pretraining --vocab_file vocab.txt --max_seq_length 13 --single_mask"),
    "several": (
        generate_samples,
        "--dir data -o data/several --vocab_file vocab.txt --max_seq_length 13 --dup_factor 2 --max_predictions_per_seq 3",
    ),
    "documents": (generate_samples, "--dir corpus -o corpus/pretraining --max_seq_length 32"),
    "task A": (generate_downstream, f"{TEXT} --sentence-num 40 --validation-num 20 --task-type A"),
    "task B": (generate_downstream, f"{TEXT} --sentence-num 40 --validation-num 20 --task-type B"),
    "float32": (lookup, f"--rule-path {RULES} --datafile data/test0.txt --save-path data/lookup_float32.hdf5"),
    "float16": (lookup, f"--rule-path {RULES} --datafile data/test0.txt --save-path data/lookup_float16.hdf5 --dtype float16"),
    "entropy": (lookup, f"--rule-path {RULES} --datafile data/test0.txt --save-path data/entropy.hdf5 --entropy-only"),
    "finished run": (run_pretraining, f"{TRAIN} --job_name finished --max_steps 6 --save_steps 3"),
    "loss": (calculate_loss, f"--model-path models/finished {MEASURED}"),
    "comparison": (calculate_loss, f"--compare {MODEL} models/finished/step0000003 {MEASURED}"),
    "trace": (calculate_hessian, f"--model-path {MODEL} {MEASURED} --estimator both --nsamples 16 --block-size 8"),
    "probe": (run_lp, f"{PROBE} --seeds 0,1"),
    "other probe": (run_lp, f"{PROBE} --seeds 0 --solver lbfgs --pool mean --bootstrap 20"),
    "probe of the language": (
        run_lp,
        f"{TASK} --features conditional --rule-path {RULES} --output_dir models/lookup_table --seeds 0 --solver adamw "
        "--tokenizer_name data/pretraining/bert-large-uncased",
    ),
    "fine-tuning": (run_ft, f"{PROBE} --seeds 0"),
}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The unpacked archive, as working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def read_or_refused(*programs: str):
    """Allow an InputError of one line if it names a program that makes the file again."""
    try:
        yield
    except InputError as error:
        assert any(program in str(error) for program in programs) and "\n" not in str(error)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_archive_is_small():
    assert ARCHIVE.stat().st_size < 150_000


def test_texts(old):
    assert read_texts(old / "data/test0.txt")[:2] == [
        "shop glad father glad harbor father tree tree",
        "check line office father glad office stand father",
    ]
    assert [len(read_texts(old / f"data/training{shard}.txt")) for shard in range(2)] == [40, 40]


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(old, name):
    with read_or_refused("generate_samples.py"):
        samples = read_samples(old / name)
        sums = (int(getattr(samples, array).sum(dtype=np.int64)) for array in DTYPES)
        assert (len(samples), *sums) == SAMPLES[name]
        assert samples.attributes["vocab_size"] == (120 if name.startswith("corpus") else 25)


@pytest.mark.parametrize(
    ("name", "probability", "weighted"),
    [
        ("lookup_float32", 0.36088001459181296, 1672.6580778146545),
        ("lookup_float16", 0.3608178211779066, 1672.632865225423),
        ("entropy", None, None),
    ],
)
def test_lookup_tables(old, name, probability, weighted):
    with read_or_refused("pcfg.lookup"):
        table = LookupTable.open(old / f"data/{name}.hdf5")
        assert (table.sentences, int(table.lengths.sum()), int(table.true_words.sum())) == (24, 192, 1642)
        assert table.mean_entropy().by_pairs() == pytest.approx((1.2061138128240902, 0.023063676585397055), rel=1e-12)
        assert float(table.log_true.sum()) == pytest.approx(-228.5684134066105, rel=1e-12)
        if probability is not None:
            conditionals = np.asarray(table.conditionals(0, 24), float)
            assert conditionals.shape == (192, 20) and conditionals[5, 5] == probability
            assert (conditionals * np.arange(20)).sum() == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize("name", RERUNS)
def test_the_same_command_again_changes_nothing(old, name):
    """Every script takes its old output for complete: nothing is written anew, and nothing fails."""
    program, arguments = RERUNS[name]
    before = contents(old)
    printed = io.StringIO()
    with read_or_refused(program.__name__, "generate_samples", "pcfg.lookup"), contextlib.redirect_stdout(printed):
        program.main(shlex.split(arguments))
        assert contents(old) == before
        assert "skipped" in printed.getvalue() or "complete" in printed.getvalue()


def test_models_give_the_recorded_loss_and_trace(old):
    """Measured anew, and compared with the numbers of the records."""
    model = old / MODEL
    assert read_json(model / "loss.json")["value"] == 3.099307055359945
    assert read_json(model / "hessian.json")["value"] == 10.282639953118933
    with read_or_refused("pcfg.lookup"):
        calculate_loss.main(shlex.split(f"--model-path {MODEL} {MEASURED} --overwrite"))
        calculate_hessian.main(shlex.split(f"--model-path {MODEL} {MEASURED} --nsamples 16 --overwrite"))
        loss = read_json(model / "loss.json")
        assert loss["value"] == pytest.approx(3.099307055359945, abs=1e-6)
        assert loss["gap"]["sentences"]["mean"] == pytest.approx(1.8931932425358546, abs=1e-6)
        assert read_json(model / "hessian.json")["value"] == pytest.approx(10.282639953118933, rel=1e-4)


def test_saved_arguments_train_the_same_model_again(old):
    """--config takes the args.json of an old model folder."""
    with read_or_refused("generate_samples.py"):
        run_pretraining.main(["--config", f"{MODEL}/args.json", "--job_name", "again"])
        pairs = (read_metrics(old / "models" / job / "metrics.jsonl") for job in ("finished", "again"))
        for before, now in zip(*pairs, strict=True):
            assert now["step"] == before["step"]
            for name in {"loss", "validation_loss", "gap_pairs", "gap_sentences"} & before.keys():
                assert now[name] == pytest.approx(before[name], abs=1e-4)


def test_an_interrupted_run_goes_on(old):
    with read_or_refused("run_pretraining.py"):
        run_pretraining.main(shlex.split(f"{TRAIN} --job_name interrupted --max_steps 60 --save_steps 2"))
        records = read_metrics(old / "models/interrupted/metrics.jsonl")
        assert [record["step"] for record in records if "loss" in record] == list(range(2, 61, 2))
        assert records[-1]["validation_loss"] == pytest.approx(2.7586745421091714, abs=1e-3)


def test_checksums_of_old_model_folders_hold(old):
    assert checkpoints.verify(old / "models") == []


def test_the_report_has_the_old_numbers(old, monkeypatch):
    """Equal cells in every column that both tables have, and most of the old columns are there."""
    monkeypatch.setattr(sys, "argv", ["report", "models", "--output", "new"])
    runpy.run_module("pretraining.report", run_name="__main__")
    before, now = (list(csv.DictReader(open(old / name / "results.csv", newline=""))) for name in ("report", "new"))
    assert [row["model"] for row in now] == [row["model"] for row in before]
    shared = before[0].keys() & now[0].keys()
    assert len(shared) > 0.8 * len(before[0])
    assert {"gap_sentences", "gap_sentences_se", "trace", "trace_se", "finetune_pcfg_B", "probe_pcfg_B"} <= shared
    for old_row, new_row in zip(before, now, strict=True):
        assert {name: new_row[name] for name in shared} == {name: old_row[name] for name in shared}
