"""Loading causal models safely, and the restricted distribution against enumeration and a loop."""

import itertools
import math
import pickle
import shutil

import pytest
import torch

from pcfg.common.files import InputError, read_json, write_json
from pcfg.common.schema import write_schema
from pretraining.sources.opt.causal_lm import (
    FORMAT,
    TOP_TOKENS,
    RestrictedLM,
    Restriction,
    check_model,
    load_causal_lm,
    read_restriction,
)


@pytest.fixture(scope="module")
def loaded(opt_folder):
    return load_causal_lm(str(opt_folder), "cpu", torch.float32)


def naive_log_joint(model, kept, start, end, limit, sentence):
    """A forward pass a token, softmax in float64 over a dictionary."""
    fed, total = [start], 0.0
    for place, token in enumerate([*(kept[column] for column in sentence), *([end] if len(sentence) < limit else [])]):
        logits = model(torch.tensor([fed])).logits[0, -1].double()
        candidates = kept if place == 0 else [*kept, end]
        total += float(logits[token]) - math.log(sum(math.exp(float(logits[other])) for other in candidates))
        fed.append(token)
    return total


def test_the_probabilities_of_all_sentences_add_up_to_one(loaded, log_joint):
    model, _, _ = loaded
    kept, limit = [9, 300, 17], 4
    restricted = RestrictedLM(model, kept, 2, 2, limit)
    total = 0.0
    for length in range(1, limit + 1):
        sentences = list(itertools.product(range(3), repeat=length))
        joint = log_joint(restricted, torch.tensor(sentences))
        assert joint.shape == (len(sentences),) and joint.dtype == torch.float32
        total += joint.double().exp().sum().item()
        for sentence in sentences[:: max(1, len(sentences) // 5)]:
            expected = naive_log_joint(model, kept, 2, 2, limit, sentence)
            assert joint[sentences.index(sentence)].item() == pytest.approx(expected, abs=1e-4)
    assert total == pytest.approx(1, abs=1e-5)


def test_the_first_position_has_no_end_token(loaded, log_joint):
    restricted = RestrictedLM(loaded[0], [9, 300], 2, 2, 4)
    logits = restricted.model(torch.tensor([[2, 9]])).logits[0]
    first, later = restricted.log_probabilities(logits, True), restricted.log_probabilities(logits, False)
    assert first[:, restricted.end].tolist() == [-math.inf] * 2 and torch.isfinite(later).all()
    assert torch.allclose(first.exp().sum(-1), torch.ones(2)) and torch.allclose(later.exp().sum(-1), torch.ones(2))
    with pytest.raises(ValueError, match="5 tokens"):
        log_joint(restricted, torch.zeros((1, 5), dtype=torch.int64))


def test_the_models_own_head_gives_the_same(loaded, log_joint, monkeypatch):
    model = loaded[0]
    before = model.lm_head
    restricted = RestrictedLM(model, [9, 300, 40], 2, 2, 6)
    assert model.lm_head is before and restricted.model.lm_head.weight.shape == (4, 16)
    assert restricted.model.model is model.model
    monkeypatch.setattr("pretraining.sources.opt.causal_lm._with_restricted_head", lambda model, _: model)
    whole = RestrictedLM(model, [9, 300, 40], 2, 2, 6)
    tokens = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    assert torch.allclose(log_joint(whole, tokens), log_joint(restricted, tokens), atol=1e-5)


def test_positions_and_tokens_that_the_model_lacks(loaded, log_joint):
    assert log_joint(RestrictedLM(loaded[0], [9], 2, 2, 64), torch.zeros((1, 64), dtype=torch.int64)).isfinite()
    with pytest.raises(InputError, match="--length-limit 66: the model has 64 positions; give at most 65"):
        RestrictedLM(loaded[0], [9], 2, 2, 65)
    with pytest.raises(InputError, match="ids 0..639 only"):
        RestrictedLM(loaded[0], [9, 640], 2, 2, 4)


def test_the_hash_is_of_the_function_and_not_of_the_kind_of_file(loaded, opt_folder, tmp_path):
    model, _, digest = loaded
    assert load_causal_lm(str(opt_folder), "cpu", torch.bfloat16)[2] == digest
    shutil.copytree(opt_folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert load_causal_lm(str(tmp_path / "bin"), "cpu", torch.float32)[2] == digest
    shutil.copytree(opt_folder, tmp_path / "other")
    configuration = read_json(tmp_path / "other" / "config.json")
    write_json(tmp_path / "other" / "config.json", {**configuration, "num_attention_heads": 4})
    assert load_causal_lm(str(tmp_path / "other"), "cpu", torch.float32)[2] != digest


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_programs_are_refused_and_not_run(opt_folder, loaded, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "was executed"
    shutil.copytree(opt_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({**loaded[0].state_dict(), "extra": Malicious(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run a program"):
        load_causal_lm(str(folder), "cpu", torch.float32)
    assert not trace.exists()
    with open(folder / "pytorch_model.bin", "wb") as file:  # the old kind of file, without a zip archive around it
        pickle.dump(Malicious(trace), file)
    with pytest.raises(InputError, match="model"):
        load_causal_lm(str(folder), "cpu", torch.float32)
    assert not trace.exists()


def test_what_is_no_causal_language_model(opt_folder, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    def refused(name, message):
        with pytest.raises(InputError, match=message):
            load_causal_lm(str(name), "cpu", torch.float32)

    refused(tmp_path / "absent", "absent: no such folder")
    refused("nobody/nothing", "nobody/nothing: not a causal language model that can be loaded; the hub is off")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "no causal language model .tokens after a position")
    write_json(tmp_path / "vision" / "config.json", {"model_type": "vit"})
    refused(tmp_path / "vision", "not a causal language model that can be loaded")
    shutil.copytree(opt_folder, tmp_path / "code")
    configuration = read_json(opt_folder / "config.json")
    remote = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "code" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_json(tmp_path / "code" / "config.json", {**configuration, **remote})
    refused(tmp_path / "code", "not a causal language model that can be loaded")
    assert not (tmp_path / "ran").exists()
    shutil.copytree(opt_folder, tmp_path / "dumb", ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*"))
    refused(tmp_path / "dumb", "tokenizer")
    shutil.copytree(opt_folder, tmp_path / "cut")
    content = (opt_folder / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut", "not a causal language model that can be loaded")
    shutil.copytree(opt_folder, tmp_path / "deeper")
    write_json(tmp_path / "deeper" / "config.json", {**configuration, "num_hidden_layers": 3})
    refused(tmp_path / "deeper", "its weights lack")


RESTRICTION = Restriction(
    format=FORMAT,
    model_name="opt",
    model_sha256="",
    kept=[9, 300],
    pieces=["Ġa", "‿b"],
    counts=[5, 3],
    start_id=2,
    end_id=2,
    max_tokens=23,
    estimated={"seed": 0},
)


def test_the_restriction_and_its_model(opt_folder, loaded, tmp_path):
    with pytest.raises(InputError, match="top_tokens.json: no such file; it is written by"):
        read_restriction(tmp_path)
    restriction = RESTRICTION.model_copy(update={"model_sha256": loaded[2]})
    write_schema(tmp_path / TOP_TOKENS, restriction)
    assert read_restriction(tmp_path) == read_restriction(tmp_path / TOP_TOKENS) == restriction
    check_model(restriction, tmp_path, str(opt_folder), loaded[2])
    restricted = RestrictedLM.of(loaded[0], restriction)
    assert restricted.kept.tolist() == [9, 300] and restricted.max_tokens == 23
    with pytest.raises(InputError, match=f"is of another model, opt .*this one's {loaded[2][:12]}"):
        check_model(RESTRICTION, tmp_path, str(opt_folder), loaded[2])


@pytest.mark.parametrize(
    "change",
    [{"format": "2"}, {"kept": [9, 9]}, {"kept": [9, 2]}, {"counts": [1]}, {"more": 1}, {"kept": "ab"}, {"max_tokens": 0}],
)
def test_a_damaged_restriction(change, tmp_path):
    write_schema(tmp_path / TOP_TOKENS, RESTRICTION)
    write_json(tmp_path / TOP_TOKENS, {**read_json(tmp_path / TOP_TOKENS), **change})
    with pytest.raises(InputError, match="make it again"):
        read_restriction(tmp_path)
