"""Natural text from documents to fine-tuning, with tiny models: the scripts' main(), one after the other."""

import csv
import json
import shlex

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

import calculate_hessian
import calculate_loss
import generate_samples
import run_ft
import run_lp
import run_pretraining
from pcfg.common.files import InputError, read_json
from pcfg.common.text import read_texts, write_labelled
from pretraining.data.samples import read_samples
from pretraining.data.vocabulary import Vocabulary
from pretraining.model.checkpoints import load_model
from pretraining.report.__main__ import main as report

SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 8 --train_micro_batch_size_per_gpu 4 --lr_schedule step "
    "--print_steps 1 --report_to none"
)
PIECES = "--tokenization pieces --max_seq_length 64 --disable_tqdm true --max_steps 3"


@pytest.fixture(scope="module")
def samples(documents, tmp_path_factory):
    """Samples of up to 512 tokens, masked at 77 places."""
    folder = tmp_path_factory.mktemp("samples")
    generate_samples.main(["--dir", str(documents), "-o", str(folder), "--n_processes", "1", "--max_seq_length", "512"])
    return folder


@pytest.fixture(scope="module")
def task(documents, tmp_path_factory):
    """Sentences of the text with words that no vocabulary has, labelled by their length."""
    folder = tmp_path_factory.mktemp("task")
    texts = [text for text in read_texts(documents / "training0.txt") if len(text) < 200]
    labels = [int(len(text) > 60) for text in texts]
    write_labelled(folder / "long.csv", [f"{text} \u266b" for text in texts[:60]], labels[:60])
    write_labelled(folder / "long_validation.csv", texts[60:90], labels[60:90])
    return ["--train_file", str(folder / "long.csv"), "--validation_file", str(folder / "long_validation.csv")]


def train(samples, output, job, flags):
    fixed = ["--dataset_path", str(samples), "--output_dir", str(output), "--job_name", job]
    run_pretraining.main([*fixed, *shlex.split(SMALL), *shlex.split(flags)])


def measure(output, vocabulary, samples, task):
    """Everything that is measured of the models under `output`."""
    data = ["--model-path", str(output), "--datafile", str(samples / "test_shard_0.hdf5")]
    data += ["--vocabfile", str(vocabulary)]
    calculate_loss.main(data)
    calculate_hessian.main([*data, "--nsamples", "4", "--positions", "2"])
    for script in (run_ft, run_lp):
        script.main(["--model_name_or_path", str(output), *task, *shlex.split(PIECES)])


def naive_loss(model, samples) -> np.ndarray:
    """-log f of each masked word, one sample at a time, padding and all."""
    losses = []
    for row in range(len(samples)):
        ids, mask = (torch.from_numpy(array[row : row + 1]).long() for array in (samples.input_ids, samples.input_mask))
        with torch.no_grad():
            log_f = torch.log_softmax(model.predict(model.encode(ids, mask)), -1)[0]
        for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True):
            if position:
                losses.append(-log_f[position, word].item())
    return np.array(losses)


def test_from_documents_to_the_report(documents, samples, task, tmp_path, capsys):
    train(samples, tmp_path, "job", "--max_steps 20 --do_validation --dynamic_masking")
    records = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) >= 20 and losses[-1] < losses[0] - 0.3
    folder = tmp_path / "job" / "step0000020"
    capsys.readouterr()
    measure(tmp_path, documents / "vocab.txt", samples, task)
    printed = capsys.readouterr().out
    assert "natural text, no exact entropy exists for this data" in printed and "are [UNK]" in printed

    record = read_json(folder / "loss.json")
    expected = naive_loss(load_model(folder), read_samples(samples / "test_shard_0.hdf5"))
    assert record["value"] == pytest.approx(expected.mean(), abs=1e-5) and record["standard_error"] > 0
    assert record["contexts"] == len(expected) and not {"entropy", "gap", "loss"} & record.keys()
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validation[-1] == pytest.approx(record["value"], abs=1e-4)
    assert read_json(folder / "hessian.json")["value"] > 0
    assert read_json(folder / "finetune_long.json")["n"] == read_json(folder / "probe_long.json")["n"] == 30

    report([str(tmp_path)])
    with open(tmp_path / "report" / "results.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["sampled_loss_pairs"]) == pytest.approx(record["value"], abs=1e-4) and row["entropy_pairs"] == ""
    assert "MLM loss" in (tmp_path / "report" / "report.html").read_text()


def test_text_itself_is_refused_with_the_way_out(documents, samples, tmp_path, tiny_model):
    data = ["--datafile", str(documents / "test0.txt"), "--vocabfile", "vocab.txt"]
    for script in (calculate_loss, calculate_hessian):
        with pytest.raises(InputError, match="test0.txt: natural text.*make masked samples of it with generate_samples.py"):
            script.main(["--model-path", str(tiny_model), *data])
    with pytest.raises(InputError, match="--max_position_embeddings: 64, but the samples in .* have 512 tokens"):
        train(samples, tmp_path, "job", "--max_steps 2 --max_position_embeddings 64")


@pytest.fixture
def bert(documents, tmp_path):
    """A folder that transformers saved: a BERT with pooler and next-sentence head, and rows for words that there aren't."""
    vocabulary = Vocabulary.read(documents / "vocab.txt")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForPreTraining(BertConfig(vocab_size=vocabulary.size + 6, **sizes, layer_norm_eps=1e-9))
    folder = tmp_path / "bert"
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary.ids, do_lower_case=True).save_pretrained(folder)
    return folder


def test_a_bert_of_transformers_is_gone_on_from_and_measured(bert, documents, samples, task, tmp_path):
    flags = f"--model_name_or_path {bert} --encoder_ln_mode post-ln --max_steps 3 --save_steps 0 --do_validation"
    with pytest.raises(InputError, match="another shape than the flags say; give --encoder_ln_mode post-ln$"):
        train(samples, tmp_path / "out", "pre", flags.replace("post-ln", "pre-ln"))
    train(samples, tmp_path / "out", "job", flags)
    start, ours = load_model(bert), load_model(tmp_path / "out/job/step0000000")
    assert ours.config == start.config and start.config.layer_norm_eps == 1e-9
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), ours.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="another shape than the flags say; give --max_position_embeddings"):
        train(samples, tmp_path / "out", "wide", flags + " --max_position_embeddings 600")

    measure(bert, bert / "tokenizer.json", samples, task)
    measure(tmp_path / "out/job/step0000000", documents / "vocab.txt", samples, task)
    for name in ("loss.json", "hessian.json", "finetune_long.json", "probe_long.json"):
        first, second = (read_json(folder / name) for folder in (bert, tmp_path / "out/job/step0000000"))
        assert first["value"] == pytest.approx(second["value"], rel=1e-5), name
    report([str(bert)])
    assert "bert" in (bert / "report" / "results.csv").read_text()
