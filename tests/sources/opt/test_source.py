"""generate_pretraining.py --source opt: files, determinism, resuming, refusals; then samples, training and downstream tasks."""

import json
import os
import shutil

import h5py
import pytest
import torch

import generate_pretraining
import generate_samples
from pcfg.common.files import InputError, read_json, sha256
from pcfg.common.text import TEXT_MANIFEST, read_texts, shard_paths
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary, resolve_tokenizer
from pretraining.sources.opt import source
from pretraining.sources.opt.causal_lm import TOP_TOKENS, load_causal_lm, read_restriction
from pretraining.sources.opt.escaped_tokens import escape, token_bytes

SIZES = {"sentence_num": 70, "shard_num": 2, "test_sentence_num": 20, "test_shard_num": 1, "seed": 1, "batch_size": 32}
SIZES |= {"top_tokens": 60, "frequency_sentences": 200, "length_limit": 9, "device": "cpu"}


def generate(model, folder, *flags, n_processes=1, **sizes):
    """Run main() with the small sizes, some changed: `shard_num=3`; None leaves a flag out."""
    values = {f"--{name.replace('_', '-')}": value for name, value in (SIZES | sizes).items() if value is not None}
    pairs = [part for pair in {**values, "--n_processes": n_processes}.items() for part in pair]
    arguments = ["--source", "opt", "--model-name", model, "--save-path", folder, *flags, *pairs]
    generate_pretraining.main([str(part) for part in arguments])


def contents(folder):
    """The bytes of all files but the manifest, whose entries come in another order."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != TEXT_MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def text(opt_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "opt"
    generate(opt_folder, folder)
    return folder


def test_the_files_of_a_run(text, opt_folder):
    tokenizer_files = {f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")}
    names = {"training0.txt", "training1.txt", "test0.txt", "vocab.txt", TOP_TOKENS, *tokenizer_files}
    assert set(contents(text)) == names
    assert [len(read_texts(path)) for path in shard_paths(text, "training")] == [70, 70]
    lines = (text / "test0.txt").read_text().split("\n")
    assert len(lines) == 40 and lines[-1] == "" and lines[1:-1:2] == [""] * 19 and all(lines[:-1:2])

    _, tokenizer, digest = load_causal_lm(str(opt_folder), "cpu", torch.float32)
    restriction, tokens = read_restriction(text), token_bytes(tokenizer)
    assert restriction.pieces == [escape(tokens[index]) for index in restriction.kept] and len(restriction.kept) == 60
    assert restriction.counts == sorted(restriction.counts, reverse=True)
    assert (restriction.model_sha256, restriction.max_tokens, restriction.start_id, restriction.end_id) == (digest, 8, 2, 2)
    assert Vocabulary.read(text / "vocab.txt").words == [*SPECIAL_TOKENS, *restriction.pieces]
    words = {word for path in shard_paths(text, "training") for sentence in read_texts(path) for word in sentence.split()}
    assert words <= set(restriction.pieces) and len(words) > 30
    assert max(len(sentence.split()) for sentence in read_texts(text / "training0.txt")) == 8

    manifest = read_json(text / TEXT_MANIFEST)
    assert set(manifest["files"]) == names and manifest["made_from"]["device"] == "cpu"
    entry = manifest["files"]["training1.txt"]
    assert entry["sentences"] == 70 and entry["words"] == len((text / "training1.txt").read_text().split())
    assert entry["sha256"] == sha256(text / "training1.txt")


def test_shards_do_not_depend_on_how_they_are_made(text, opt_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    generate(opt_folder, tmp_path / "two", n_processes=2)
    assert contents(tmp_path / "two") == contents(text)
    # On this model no uniform number lies where the rounding of another batch decides.
    generate(opt_folder, tmp_path / "batches", batch_size=7, shard_num=1, test_shard_num=0)
    assert contents(tmp_path / "batches")["training0.txt"] == contents(text)["training0.txt"]
    generate(opt_folder, tmp_path / "seed", seed=2)
    shards = [folder / name for folder in (text, tmp_path / "seed") for name in ("training0.txt", "training1.txt", "test0.txt")]
    assert len({path.read_text()[:300] for path in shards}) == 6


def test_an_interrupted_run_goes_on(text, opt_folder, tmp_path, monkeypatch, capsys):
    original, calls = source.sample, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr("pretraining.sources.opt.source.sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(opt_folder, tmp_path)
    assert {"training0.txt", TOP_TOKENS} <= set(contents(tmp_path)) < set(contents(text))
    monkeypatch.setattr("pretraining.sources.opt.source.count_tokens", None)  # the frequencies are not counted again
    generate(opt_folder, tmp_path)
    assert "2 shards made, 1 skipped" in capsys.readouterr().out
    assert contents(tmp_path) == contents(text)
    (tmp_path / "training1.txt").write_bytes(b"damaged")
    generate(opt_folder, tmp_path, shard_num=3)
    output = capsys.readouterr().out
    assert "2 shards made, 2 skipped" in output and "plan: 3 training shards, 210 sentences" in output
    assert contents(text).items() < contents(tmp_path).items()
    generate(opt_folder, tmp_path)
    assert "0 shards made, 3 skipped" in capsys.readouterr().out


def test_text_made_otherwise_is_refused_or_replaced(text, opt_folder, tmp_path):
    shutil.copytree(text, tmp_path / "data")
    for changed in ({"seed": 2}, {"top_tokens": 61}, {"length_limit": 10}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match="the files here were made otherwise.*--overwrite"):
            generate(opt_folder, tmp_path / "data", **changed)
    manifest = (tmp_path / "data" / TEXT_MANIFEST).read_text()
    (tmp_path / "data" / TEXT_MANIFEST).write_text(manifest.replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(InputError, match="device was 'cuda', now 'cpu'"):
        generate(opt_folder, tmp_path / "data")
    generate(opt_folder, tmp_path / "data", "--overwrite", top_tokens=30, shard_num=1)
    generate(opt_folder, tmp_path / "fresh", top_tokens=30, shard_num=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_what_others_wrote_is_not_replaced(opt_folder, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="tokenizer: not of this script"):
        generate(opt_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_kept_tokens_of_another_folder(text, opt_folder, make_opt, tmp_path):
    generate(opt_folder, tmp_path / "all", "--top-tokens-file", text, top_tokens=None, length_limit=5, test_shard_num=0)
    first, again = read_restriction(text), read_restriction(tmp_path / "all")
    assert (again.kept, again.counts, again.estimated) == (first.kept, first.counts, first.estimated) and again.max_tokens == 4
    generate(opt_folder, tmp_path / "some", "--top-tokens-file", text / TOP_TOKENS, top_tokens=20, shard_num=1)
    assert read_restriction(tmp_path / "some").kept == first.kept[:20]
    with pytest.raises(InputError, match="--top-tokens 61: .* has 60; leave --top-tokens out"):
        generate(opt_folder, tmp_path / "more", "--top-tokens-file", text, top_tokens=61)
    shutil.copytree(opt_folder, tmp_path / "model")
    make_opt(tmp_path / "model", 640, seed=7)
    with pytest.raises(InputError, match="is of another model"):
        generate(tmp_path / "model", tmp_path / "more", "--top-tokens-file", text)
    with pytest.raises(InputError, match="nowhere: no such file"):
        generate(opt_folder, tmp_path / "more", "--top-tokens-file", tmp_path / "nowhere")
    assert not (tmp_path / "more").exists()


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_can_not_be_had(opt_folder, tmp_path, monkeypatch):
    def refused(message, model=opt_folder, *flags, **sizes):
        with pytest.raises(InputError, match=message):
            generate(model, tmp_path / "data", *flags, **sizes)
        assert not (tmp_path / "data").exists()

    refused("--top-tokens 700: the model has [0-9]+ tokens that can be words", top_tokens=700)
    refused("--length-limit 66: the model has 64 positions", length_limit=66)
    refused("--length-limit 1: no sentence", length_limit=1)
    refused("nothing to make", shard_num=0, test_shard_num=0)
    refused("no such folder", tmp_path / "nowhere")
    refused("the hub is off", "facebook/opt-125m")
    if not torch.cuda.is_available():
        refused("--device cuda: there is none", device="cuda")
    shutil.copytree(opt_folder, tmp_path / "endless")
    configuration = read_json(opt_folder / "tokenizer_config.json")
    del configuration["eos_token"]
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(configuration))
    (tmp_path / "endless" / "special_tokens_map.json").unlink(missing_ok=True)
    refused("no end token", tmp_path / "endless")
    with monkeypatch.context() as patch:
        patch.setattr("pretraining.sources.opt.source.sample", out_of_memory)
        with pytest.raises(InputError, match="--batch-size 32: not enough memory on cpu; give a smaller one"):
            generate(opt_folder, tmp_path / "data")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10**4, 10**4))
    with pytest.raises(InputError, match="GB to write, but the disk has 1e-05 GB free"):
        generate(opt_folder, tmp_path / "data")
    assert not shard_paths(tmp_path / "data", "training")


@pytest.fixture(scope="module")
def samples(text):
    folder = text / "pretraining"
    flags = "--max_seq_length 12 --single_mask --model_name pieces --n_processes 1".split()
    generate_samples.main(["--dir", str(text), "-o", str(folder), *flags])
    return folder


def test_10000_generated_lines_come_back_token_by_token(opt_folder, tmp_path):
    generate(opt_folder, tmp_path, sentence_num=10_000, shard_num=1, test_shard_num=0, batch_size=2_000, top_tokens=300)
    flags = "--max_seq_length 12 --single_mask --model_name pieces --n_processes 1".split()
    generate_samples.main(["--dir", str(tmp_path), "-o", str(tmp_path / "samples"), *flags])
    lines, vocabulary = read_texts(tmp_path / "training0.txt"), Vocabulary.read(tmp_path / "vocab.txt")
    expected = [[vocabulary.ids[piece] for piece in line.split(" ")] for line in lines]
    for tokenizer in (resolve_tokenizer("pieces", [tmp_path / "samples"]), resolve_tokenizer("tokenizer", [tmp_path])):
        assert tokenizer(lines, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.convert_ids_to_tokens(expected[0]) == lines[0].split(" ")
    with h5py.File(tmp_path / "samples" / "train_shard_0.hdf5") as file:
        masked, positions, labels = (file[name][:] for name in ("input_ids", "masked_lm_positions", "masked_lm_ids"))
    assert len(lines) == len(masked) == 10_000
    for row, position, label, ids in zip(masked, positions, labels, expected, strict=True):
        assert row[position[0]] == vocabulary.mask_id
        row[position[0]] = label[0]
        assert row[: len(ids) + 2].tolist() == [vocabulary.cls_id, *ids, vocabulary.sep_id]


def test_a_tokenizer_that_is_not_the_texts(text, tmp_path):
    shutil.copytree(text, tmp_path / "text", ignore=shutil.ignore_patterns("pretraining"))
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "cat"]))
    arguments = ["--dir", str(tmp_path / "text"), "-o", str(tmp_path / "samples"), "--n_processes", "1"]
    with pytest.raises(InputError, match="the text's own tokenizer has 65 entries that are not the 6"):
        generate_samples.main([*arguments, "--vocab_file", str(tmp_path / "vocab.txt")])
    (tmp_path / "text" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json: can't be loaded"):
        generate_samples.main(arguments)
    assert not (tmp_path / "samples").exists()


def test_pretraining_and_downstream_tasks_of_english(samples, english, tmp_path, capsys):
    """20 steps on such data, then SST-2's and QNLI's columns: sentences are told apart by a frequent word."""
    import run_ft
    import run_lp
    import run_pretraining

    shape = "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 32 --max_position_embeddings 32"
    steps = "--lr 5e-3 --train_batch_size 16 --train_micro_batch_size_per_gpu 16 --lr_schedule step --max_steps 20"
    where = ["--dataset_path", str(samples), "--output_dir", str(tmp_path), "--job_name", "job", "--tokenizer_name", "pieces"]
    run_pretraining.main([*where, *shape.split(), *steps.split()])
    model = tmp_path / "job" / "step0000020"
    lines = [" ".join(line.split()[:12]) for line in english if "\t" not in line and len(line.split()) > 6][:240]
    for name, part in (("train", lines[:160]), ("dev", lines[160:])):
        rows = [f"{line}\t{int(' the ' in line)}" for line in part]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        rows = [f"what is it?\t{line}\t{('entailment', 'not_entailment')[' the ' in line]}" for line in part]
        (tmp_path / f"{name}_qnli.tsv").write_text("\n".join(["question\tsentence\tlabel", *rows]) + "\n")
    common = ["--model_name_or_path", str(model), "--max_seq_length", "32", "--disable_tqdm", "true"]

    def files(end=""):
        return ["--train_file", str(tmp_path / f"train{end}.tsv"), "--validation_file", str(tmp_path / f"dev{end}.tsv")]

    run_ft.main([*common, "--task_name", "sst2", *files(), "--max_steps", "3"])
    run_lp.main([*common, "--task_name", "qnli", *files("_qnli"), "--num_train_epochs", "2"])
    assert "are [UNK], unknown to the model" in capsys.readouterr().out
    assert read_json(model / "finetune_sst2.json")["n"] == read_json(model / "probe_qnli.json")["n"] == 80
