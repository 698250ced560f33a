"""generate_samples.py on natural text: the ids are the tokenizer's, the samples those of a loop over documents."""

import os
import shutil

import numpy as np
import pytest
from transformers import BertTokenizerFast

import generate_samples
from pcfg.common.files import InputError, keyed_rng, read_json, sha256, write_json
from pretraining.data.masking import MaskingRule, remask
from pretraining.data.samples import read_samples, sample_paths
from pretraining.data.vocabulary import Vocabulary, resolve_tokenizer


def run(text, output, *more):
    generate_samples.main(["--dir", str(text), "-o", str(output), "--n_processes", "1", *map(str, more)])


def restored(samples) -> list[list[int]]:
    """The ids of each sample without masks, [CLS], [SEP] and padding."""
    ids = samples.input_ids.copy()
    row, column = np.nonzero(samples.masked_lm_positions)
    ids[row, samples.masked_lm_positions[row, column]] = samples.masked_lm_ids[row, column]
    return [line[1 : length - 1].tolist() for line, length in zip(ids, samples.input_mask.sum(1, dtype=int), strict=True)]


def read_documents(path) -> list[list[str]]:
    return [document.split("\n") for document in path.read_text().rstrip("\n").split("\n\n")]


def greedy(documents, tokenizer, room) -> list[list[int]]:
    """Whole sentences as long as they fit; longer ones are cut."""
    samples = []
    for sentences in documents:
        sample = []
        for sentence in sentences:
            ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            if sample and len(sample) + len(ids) > room:
                samples.append(sample)
                sample = []
            while len(ids) > room:
                samples.append(ids[:room])
                ids = ids[room:]
            sample = sample + ids
        samples.append(sample)
    return samples


@pytest.mark.parametrize(("length", "lower"), [(512, 1), (24, 0)])
def test_samples_are_those_of_a_loop_with_the_saved_tokenizer(documents, tmp_path, capsys, length, lower):
    run(documents, tmp_path, "--max_seq_length", length, "--do_lower_case", lower, "--short_seq_prob", 0)
    tokenizer = resolve_tokenizer("bert-large-uncased", [tmp_path])
    total = unknown = cut = 0
    for split, name, number in (("train", "training", 0), ("train", "training", 1), ("test", "test", 0)):
        texts = read_documents(documents / f"{name}{number}.txt")
        samples = read_samples(tmp_path / f"{split}_shard_{number}.hdf5")
        expected = greedy(texts, tokenizer, length - 2)
        assert restored(samples) == expected
        assert samples.attributes["text"] == "documents" and samples.attributes["short_seq_prob"] == 0
        entry = read_json(tmp_path / "manifest_samples.json")["files"][f"{split}_shard_{number}.hdf5"]
        assert entry["samples"] == len(samples) and entry["tokens"] == sum(map(len, expected))
        assert entry["unknown"] == sum(sample.count(tokenizer.unk_token_id) for sample in expected)
        total, unknown, cut = total + entry["tokens"], unknown + entry["unknown"], cut + entry["cut_sentences"]
    assert unknown > 0 and (cut > 0) == (length == 24)
    printed = capsys.readouterr().out
    assert f"{total:,} WordPieces; {unknown:,} ({unknown / total:.2%}) are [UNK]; {cut:,} sentences were split" in printed


def test_masks_follow_the_rule_and_pieces_are_words_too(documents, tmp_path):
    run(documents, tmp_path, "--max_seq_length", 512, "--dup_factor", 3, "--short_seq_prob", 0)
    vocabulary = Vocabulary.read(documents / "vocab.txt")
    is_piece = np.array([word.startswith("##") for word in vocabulary.words])
    shards = [read_samples(path) for path in sample_paths(tmp_path, "train")]
    rule = MaskingRule.from_attributes(shards[0].attributes, "")
    assert rule == MaskingRule(0.15, 77, pieces=True)  # 15% of 512
    random_words = []
    for samples in (*shards, remask(shards[0], rule, vocabulary, keyed_rng(0, "test", 0))):
        samples.check_vocabulary(vocabulary, "")
        lengths = samples.input_mask.sum(1, dtype=int) - 2
        masks = (samples.masked_lm_positions > 0).sum(1)
        assert (masks == rule.count_masks(lengths)).all() and masks.max() > 40
        row, column = np.nonzero(samples.masked_lm_positions)
        true = samples.masked_lm_ids[row, column]
        became = samples.input_ids[row, samples.masked_lm_positions[row, column]]
        assert is_piece[true].mean() > 0.1
        assert abs((became == vocabulary.mask_id).mean() - 0.8) < 0.03
        random_words.append(became[(became != vocabulary.mask_id) & (became != true)])
    random_words = np.concatenate(random_words)
    assert abs(is_piece[random_words].mean() - is_piece.mean()) < 0.05
    assert not np.isin(random_words, vocabulary.special_ids).any()


def test_one_mask_a_sample(documents, tmp_path):
    run(documents, tmp_path, "--max_seq_length", 128, "--single_mask")
    samples = read_samples(tmp_path / "train_shard_0.hdf5")
    assert samples.masked_lm_positions.shape[1] == 1 and ((samples.input_ids == 4).sum(1) == 1).all()


def test_short_samples_are_drawn_for_each_shard_and_lose_nothing(documents, tmp_path, monkeypatch):
    """By default a tenth of the samples; a function of (seed, shard) and of nothing else."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    flags = ("--max_seq_length", 64, "--dup_factor", 2)
    run(documents, tmp_path / "one", *flags)
    run(documents, tmp_path / "two", *flags, "--n_processes", 2)
    run(documents, tmp_path / "other", *flags, "--seed", 1)
    digests = [{path.name: sha256(path) for path in (tmp_path / name).glob("*.hdf5")} for name in ("one", "two", "other")]
    assert digests[0] == digests[1] and len(digests[0]) == 6
    assert not set(digests[0].values()) & set(digests[2].values())
    first, second = (restored(read_samples(tmp_path / "one" / f"train_shard_{k}.hdf5")) for k in (0, 1))
    assert first != second and sum(first, []) == sum(second, [])
    assert read_samples(tmp_path / "one" / "train_shard_0.hdf5").attributes["short_seq_prob"] == 0.1


def test_which_text_is_of_documents(documents, tmp_path):
    """Without the manifest, text is of sentences, unless --text says otherwise."""
    plain = tmp_path / "plain"
    shutil.copytree(documents, plain)
    (plain / "manifest_pretraining.json").unlink()
    with pytest.raises(InputError, match="test0.txt: sentence 1: word .* is not in the vocabulary|training0.txt: sentence 1"):
        run(plain, tmp_path / "out", "--max_seq_length", 512)
    run(plain, tmp_path / "by_flag", "--max_seq_length", 64, "--text", "documents")
    run(documents, tmp_path / "by_manifest", "--max_seq_length", 64)
    for path in sample_paths(tmp_path / "by_flag", "train"):
        assert sha256(path) == sha256(tmp_path / "by_manifest" / path.name)
    with pytest.raises(InputError, match="is not in the vocabulary"):
        run(documents, tmp_path / "out", "--text", "sentences", "--max_seq_length", 512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "sentences", "--short_seq_prob", 0.1], "--short_seq_prob 0.1: sentences aren't packed"),
        (["--max_seq_length", 2], "--max_seq_length: 2 leaves no room"),
    ],
)
def test_wrong_flags(documents, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(documents, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_of_a_models_tokenizer(documents, tmp_path):
    """tokenizer.json, where transformers writes no vocab.txt; it must be BERT's, with the same letter case."""
    BertTokenizerFast(vocab=Vocabulary.read(documents / "vocab.txt").ids, do_lower_case=False).save_pretrained(
        tmp_path / "bert"
    )
    path = tmp_path / "bert" / "tokenizer.json"
    for name, vocabulary in (("txt", documents / "vocab.txt"), ("json", path)):
        run(documents, tmp_path / name, "--vocab_file", vocabulary, "--do_lower_case", 0, "--max_seq_length", 64)
    assert sha256(tmp_path / "txt" / "train_shard_0.hdf5") == sha256(tmp_path / "json" / "train_shard_0.hdf5")
    with pytest.raises(InputError, match="tokenizer.json: normalizer has lowercase False.*give --do_lower_case 0"):
        run(documents, tmp_path / "out", "--vocab_file", path)
    write_json(path, {**read_json(path), "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(InputError, match="pre_tokenizer has type 'Whitespace'.*only BERT's"):
        run(documents, tmp_path / "out", "--vocab_file", path, "--do_lower_case", 0)


def test_text_without_a_token(documents, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(documents / "vocab.txt", text)
    (text / "training0.txt").write_text("\u200b\n")
    with pytest.raises(InputError, match="training0.txt: the tokenizer makes no token of it"):
        run(text, tmp_path / "out", "--text", "documents")


def test_a_rerun_skips_what_is_complete(documents, tmp_path, capsys):
    run(documents, tmp_path, "--max_seq_length", 64)
    (tmp_path / "train_shard_1.hdf5").unlink()
    before = capsys.readouterr().out
    run(documents, tmp_path, "--max_seq_length", 64)
    after = capsys.readouterr().out
    assert "2 skipped (complete), 1 to make" in after
    assert before.splitlines()[-2] == after.splitlines()[-2]  # the counts
    with pytest.raises(InputError, match="short_seq_prob was 0.1, now 0.2"):
        run(documents, tmp_path, "--max_seq_length", 64, "--short_seq_prob", 0.2)
