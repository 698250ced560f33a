import json
import math
import os
import pickle
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertTokenizerFast

from pcfg.common.files import InputError, read_json, sha256, write_json, write_sealed
from pretraining.data.vocabulary import Vocabulary
from pretraining.data.wordpiece import check_same_tokenizer
from pretraining.model import checkpoints
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import (
    check_vocabulary,
    find_model,
    load_model,
    load_vocabulary,
    model_folders,
    read_facts,
    save_model,
)
from pretraining.model.config import ModelConfig
from tests.bert_tokenizer import build_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


def make_folder(folder, seed=1, **changes) -> MaskedLM:
    torch.manual_seed(seed)
    vocabulary = Vocabulary(WORDS)
    model = MaskedLM(ModelConfig(len(WORDS), 16, 2, 4, 32, max_position_embeddings=9, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(folder, model, build_tokenizer(vocabulary, True, 9), vocabulary, {"step": 3})
    return model.eval()


def made_by_others(folder):
    """A folder without the hashes of ours."""
    (folder / "args.json").unlink()
    return folder


def padded_batch():
    ids = torch.randint(1, len(WORDS), (4, 9))
    mask = torch.ones_like(ids)
    ids[0, 6:] = mask[0, 6:] = 0
    return ids, mask


@pytest.mark.parametrize("mode, name", [("pre-ln", "RobertaPreLayerNormForMaskedLM"), ("post-ln", "BertForMaskedLM")])
@pytest.mark.parametrize("act", ["gelu", "relu", "tanh", "swish"])
def test_transformers_reads_our_folders_and_we_read_theirs(tmp_path, mode, name, act):
    model = make_folder(tmp_path / "ours", encoder_ln_mode=mode, hidden_act=act)
    ids, mask = padded_batch()
    expected = model.predict(model.encode(ids, mask))
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert type(stock).__name__ == name
    logits = stock(input_ids=ids, attention_mask=mask).logits
    assert (logits - expected)[mask.bool()].abs().max() < 1e-5
    stock.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert torch.equal(again.predict(again.encode(ids, mask)), expected)


def test_the_folder_is_whole(tmp_path):
    model = make_folder(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    facts = read_facts(tmp_path / "model")
    assert facts["step"] == 3
    assert facts["files"]["model.safetensors"] == sha256(tmp_path / "model" / "model.safetensors")
    assert facts["files"].keys() == {path.name for path in (tmp_path / "model").iterdir()}
    assert load_vocabulary(tmp_path / "model").words == WORDS
    assert AutoTokenizer.from_pretrained(tmp_path / "model").convert_tokens_to_ids(["c", "[MASK]"]) == [7, 4]


def test_rms_norm_is_ours_alone(tmp_path):
    model = make_folder(tmp_path / "model", layer_norm_type="rms_norm")
    ids, mask = padded_batch()
    assert torch.equal(load_model(tmp_path / "model").encode(ids, mask), model.encode(ids, mask))
    with pytest.raises(ValueError, match="bert-rms-norm"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "model")


def test_pytorch_bin_is_read_without_pickle(tmp_path):
    model = make_folder(tmp_path / "model")
    made_by_others(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    assert torch.equal(load_model(tmp_path / "model").head_dense.weight, model.head_dense.weight)


def bert_of_transformers(folder, kind, lower, seed=0):
    """What transformers saves of a random BERT with 3 rows more than words, and its output on a padded batch."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = kind(BertConfig(vocab_size=len(WORDS) + 3, max_position_embeddings=9, initializer_range=0.3, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=lower).save_pretrained(folder)
    ids, mask = padded_batch()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    return ids, mask, output.prediction_logits if kind is BertForPreTraining else output.logits


@pytest.mark.parametrize("as_pickle", [False, True])
@pytest.mark.parametrize(("kind", "lower"), [(BertForMaskedLM, True), (BertForPreTraining, False)])
def test_a_bert_that_transformers_saved(tmp_path, kind, lower, as_pickle):
    """Pooler and next-sentence head are left out; the words are those of tokenizer.json."""
    ids, mask, expected = bert_of_transformers(tmp_path, kind, lower)
    if as_pickle:  # as older versions did, with the decoder as a copy
        weights = tmp_path / "model.safetensors"
        stored = safetensors.torch.load_file(weights)
        stored["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"]
        stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"]
        stored["bert.embeddings.position_ids"] = torch.arange(9)[None]
        torch.save(stored, tmp_path / "pytorch_model.bin")
        weights.unlink()
    model = load_model(tmp_path)
    assert (model.config.type_vocab_size, model.config.hidden_act, model.config.vocab_size) == (2, "gelu", len(WORDS) + 3)
    assert (model.predict(model.encode(ids, mask)) - expected)[mask.bool()].abs().max() < 1e-5
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.words == WORDS
    check_vocabulary(tmp_path, vocabulary, "itself")
    assert model_folders(tmp_path) == [tmp_path]
    check_same_tokenizer(tmp_path / "tokenizer.json", vocabulary, lower)
    with pytest.raises(InputError, match=f"normalizer has lowercase {lower}.*give --do_lower_case {int(lower)}"):
        check_same_tokenizer(tmp_path / "tokenizer.json", vocabulary, not lower)


def test_folders_of_transformers_that_are_no_model_here(tmp_path):
    bert_of_transformers(tmp_path, BertForMaskedLM, True)
    config, tokenizer, weights = (tmp_path / name for name in ("config.json", "tokenizer.json", "model.safetensors"))
    content = read_json(config)
    for changes, message in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only .*'absolute'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new' is not one of"),
        ({"model_type": "distilbert"}, "model_type 'distilbert' is not one of"),
    ):
        write_json(config, {**content, **changes})
        with pytest.raises(InputError, match=f"config.json: .*{message}"):
            load_model(tmp_path)
    write_json(config, {**content, "vocab_size": len(WORDS) - 1})
    with pytest.raises(InputError, match="tokenizer.json: 15 words, but the model knows 14"):
        load_vocabulary(tmp_path)
    write_json(config, content)
    stored = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**stored, "cls.predictions.decoder.bias": stored["cls.predictions.bias"] + 1}, weights)
    with pytest.raises(InputError, match="'cls.predictions.decoder.bias' is not that of the word table"):
        load_model(tmp_path)
    write_json(tokenizer, {**read_json(tokenizer), "model": {"type": "BPE"}})
    with pytest.raises(InputError, match="its tokenizer is a BPE"):
        load_vocabulary(tmp_path)
    write_json(tokenizer, {})
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer"):
        load_vocabulary(tmp_path)
    tokenizer.unlink()
    with pytest.raises(InputError, match="no vocab.txt and no tokenizer.json; save the model's tokenizer"):
        load_vocabulary(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plain_pickle(content, path):
    with open(path, "wb") as file:
        pickle.dump(content, file)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain_pickle, torch.save, legacy])
def test_a_malicious_pickle_of_others_is_refused(tmp_path, write):
    bert_of_transformers(tmp_path, BertForPreTraining, True)
    (tmp_path / "model.safetensors").unlink()
    write({"bert.pooler.dense.bias": Bomb(str(tmp_path / "executed"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: refused"):
        load_model(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("write", [plain_pickle, torch.save, legacy])
def test_a_malicious_pickle_is_refused(tmp_path, write):
    make_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    write({"weights": Bomb(str(tmp_path / "executed"))}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: is not among the files"):
        load_model(tmp_path / "model")
    write_sealed(tmp_path / "model" / "args.json", {"step": 3})  # whoever can replace the weights can replace the hashes
    with pytest.raises(InputError, match="pytorch_model.bin: refused"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def test_damaged_weights(tmp_path):
    make_folder(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(InputError, match="model.safetensors: damaged, its SHA-256.*args.json; make the model again"):
        load_model(tmp_path / "model")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(made_by_others(tmp_path / "model"))


def test_infinite_weights_and_weights_of_another_folder_are_checked(tmp_path):
    model = make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", seed=2)
    spoiled = tmp_path / "b" / "model.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="b/model.safetensors: damaged"):
        load_model(tmp_path / "a", weights=spoiled)
    with torch.no_grad():
        model.decoder_bias[3] = math.nan
    safetensors.torch.save_file(checkpoints.to_stored(model.state_dict(), model.config), tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="nan.safetensors: decoder_bias has entries that are not finite"):
        load_model(tmp_path / "a", weights=tmp_path / "nan.safetensors")


def test_files_changed_on_purpose(tmp_path, capsys):
    make_folder(tmp_path / "model")
    config, facts = tmp_path / "model" / "config.json", tmp_path / "model" / "args.json"
    write_json(config, {**read_json(config), "hidden_dropout_prob": 0.0})
    with pytest.raises(InputError, match="config.json: damaged.*if it was changed on purpose, remove 'files' there"):
        load_model(tmp_path / "model")
    write_json(facts, {name: value for name, value in read_json(facts).items() if name != "files"})
    assert load_model(tmp_path / "model").config.hidden_dropout_prob == 0.0
    assert "args.json lists no hashes" in capsys.readouterr().out
    write_json(facts, {**read_json(facts), "files": {}})
    with pytest.raises(InputError, match="args.json: damaged"):
        load_model(tmp_path / "model")


def test_a_full_disk_keeps_the_old_model(tmp_path, monkeypatch):
    old = make_folder(tmp_path / "model")

    def full(*_, **__):
        raise safetensors.SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="model.safetensors: can't be written .*No space left on device"):
        make_folder(tmp_path / "model", seed=2)
    assert torch.equal(load_model(tmp_path / "model").head_dense.weight, old.head_dense.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello world\n"),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes()[:200] + bytes(200) + path.read_bytes()[400:]),
        lambda path: torch.save([torch.ones(2)], path),
        lambda path: torch.save({"bert.embeddings.word_embeddings.weight": "text", 3: torch.ones(2)}, path),
    ],
)
def test_damaged_pytorch_bin(tmp_path, spoil):
    make_folder(tmp_path / "model")
    made_by_others(tmp_path / "model")
    weights, path = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "pytorch_model.bin"
    torch.save(safetensors.torch.load_file(weights), path)
    weights.unlink()
    spoil(path)
    with pytest.raises(InputError, match="pytorch_model.bin: "):
        load_model(tmp_path / "model")


def test_config_of_another_model(tmp_path):
    make_folder(tmp_path / "model")
    made_by_others(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(InputError, match=r"intermediate.dense.weight' has shape \(32, 16\), config.json says \(64, 16\)"):
        load_model(tmp_path / "model")
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3, "intermediate_size": 32}))
    with pytest.raises(InputError, match="has no weight 'roberta_prelayernorm.encoder.layer.2"):
        load_model(tmp_path / "model")


def test_model_folders_finds_models_only(tmp_path):
    make_folder(tmp_path / "job" / "step2")
    for hidden in ("job/training_state/model", ".trash/model", "job/step1"):
        shutil.copytree(tmp_path / "job" / "step2", tmp_path / hidden)
    (tmp_path / "job" / "step1" / "model.safetensors").unlink()
    assert model_folders(tmp_path) == [tmp_path / "job" / "step2"]
    with pytest.raises(InputError, match="no model folder"):
        model_folders(tmp_path / "job" / "step1")
    with pytest.raises(InputError, match="no such folder"):
        model_folders(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a model folder"):
        load_model(tmp_path / "job" / "step1")


def test_another_vocabulary_is_refused(tmp_path):
    make_folder(tmp_path / "model")
    check_vocabulary(tmp_path / "model", Vocabulary(WORDS), "vocab.txt")
    with pytest.raises(InputError, match="vocab.txt: 15 words with hash"):
        check_vocabulary(tmp_path / "model", Vocabulary([*WORDS[:-2], "j", "i"]), "vocab.txt")


def test_a_hub_name_fails_at_once_offline():
    with pytest.raises(InputError, match="model bert-base-uncased: no such folder.*HF_HUB_OFFLINE=0"):
        find_model("bert-base-uncased")


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    """What a download would give, with the weights' names that Google's BERT has there."""
    model = make_folder(tmp_path / "hub", encoder_ln_mode="post-ln")
    made_by_others(tmp_path / "hub")
    weights = tmp_path / "hub" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in safetensors.torch.load_file(weights).items():
        kind = ".".join(name.split(".")[-2:])
        renamed[name.replace(kind, old.get(kind, kind))] = tensor
    assert any(name.endswith("gamma") for name in renamed)
    safetensors.torch.save_file(renamed, weights)

    def download(name, allow_patterns, local_files_only):
        assert name == "somebody/bert" and "model.safetensors" in allow_patterns and not local_files_only
        return str(tmp_path / "hub")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = find_model("somebody/bert")
    assert torch.equal(load_model(folder).embeddings.norm.weight, model.embeddings.norm.weight)


def verify(folder):
    checkpoints.main(["verify", str(folder)])


def test_verify_proves_that_models_are_whole_and_distinct(tmp_path, capsys):
    for step in (0, 1, 2):
        make_folder(tmp_path / f"step{step}", seed=step)
    verify(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{tmp_path}/step{step}: step 3" for step in (0, 1, 2)]

    shutil.copytree(tmp_path / "step1", tmp_path / "again")
    with pytest.raises(InputError, match="step1: has the same weights as .*again"):
        verify(tmp_path)
    shutil.rmtree(tmp_path / "again")
    tokenizer = tmp_path / "step2" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("[MASK]", "[MUSK]"))
    with pytest.raises(InputError, match="1 problem.*\n.*step2/tokenizer.json: damaged"):
        verify(tmp_path)


def test_verify_reads_what_others_made(tmp_path, capsys):
    make_folder(tmp_path / "model")
    made_by_others(tmp_path / "model")
    verify(tmp_path)
    assert "made by others" in capsys.readouterr().out
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["lm_head.bias"][3] = float("nan")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(InputError, match="decoder_bias has entries that are not finite"):
        verify(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        verify(tmp_path / "nowhere")
