import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pcfg.artefacts import InputError
from pretraining.data.vocabulary import Vocabulary, build_tokenizer
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

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


def make_folder(folder, **changes) -> MaskedLM:
    torch.manual_seed(1)
    vocabulary = Vocabulary(WORDS)
    model = MaskedLM(ModelConfig(len(WORDS), 16, 2, 4, 32, max_position_embeddings=9, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(folder, model, build_tokenizer(vocabulary, True, 9), vocabulary, {"step": 3})
    return model.eval()


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
    assert read_facts(tmp_path / "model") == {"step": 3}
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
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    assert torch.equal(load_model(tmp_path / "model").head_dense.weight, model.head_dense.weight)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused(tmp_path):
    make_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with open(tmp_path / "model" / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weights": Bomb(str(tmp_path / "executed"))}, file)
    with pytest.raises(InputError, match="pytorch_model.bin: refused"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def test_damaged_weights(tmp_path):
    make_folder(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(tmp_path / "model")


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
    weights, path = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "pytorch_model.bin"
    torch.save(safetensors.torch.load_file(weights), path)
    weights.unlink()
    spoil(path)
    with pytest.raises(InputError, match="pytorch_model.bin: "):
        load_model(tmp_path / "model")


def test_config_of_another_model(tmp_path):
    make_folder(tmp_path / "model")
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
