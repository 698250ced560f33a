import json

import pytest
import torch

import calculate_loss
import enlarge
from pcfg.artefacts import InputError
from pretraining.data.vocabulary import build_tokenizer
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, load_vocabulary, save_model
from pretraining.model.config import ModelConfig


def save_random(folder, tiny_model, *shape):
    vocabulary = load_vocabulary(tiny_model)
    model = MaskedLM(ModelConfig(vocabulary.size, *shape, max_position_embeddings=10))
    save_model(folder, model, build_tokenizer(vocabulary, True, 10), vocabulary, {})


def run(small, large, target, times=2):
    flags = {"--checkpoint-path": small, "--large-model-path": large, "--enlarged-model-path": target}
    enlarge.main([*(str(part) for pair in flags.items() for part in pair), "--time-enlarged", str(times)])


@pytest.mark.parametrize("layers", [2, 4])
def test_loss_and_logits_are_the_small_models(tiny_model, tiny_data, tiny_rules, tmp_path, layers):
    save_random(tmp_path / "large", tiny_model, 32, layers, 4, 64)
    run(tiny_model, tmp_path / "large", tmp_path / "models" / "enlarged")
    small, large = load_model(tiny_model), load_model(tmp_path / "models" / "enlarged")
    ids = torch.randint(large.config.vocab_size, (16, 10))
    assert (small.predict(small.encode(ids)) - large.predict(large.encode(ids))).abs().max() < 1e-4
    assert large.config.hidden_size == 32 and large.config.num_hidden_layers == layers
    save_model(
        tmp_path / "models" / "small",
        small,
        build_tokenizer(load_vocabulary(tiny_model), True, 10),
        load_vocabulary(tiny_model),
        {},
    )
    data = {"--datafile": tiny_data / "test0.txt", "--vocabfile": "vocab.txt", "--rule-path": tiny_rules}
    calculate_loss.main(["--model-path", str(tmp_path / "models"), *(str(part) for pair in data.items() for part in pair)])
    losses = [json.loads((tmp_path / "models" / name / "loss.json").read_text())["value"] for name in ("small", "enlarged")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    facts = json.loads((tmp_path / "models" / "enlarged" / "args.json").read_text())
    assert facts["enlarged_from"]["times"] == 2 and facts["step"] == 0


def test_inputs_are_never_overwritten(tiny_model, tmp_path):
    save_random(tmp_path / "large", tiny_model, 32, 2, 4, 64)
    before = (tmp_path / "large" / "model.safetensors").read_bytes()
    for target in (tmp_path / "large", tiny_model):
        with pytest.raises(InputError, match="exists already"):
            run(tiny_model, tmp_path / "large", target)
    assert (tmp_path / "large" / "model.safetensors").read_bytes() == before


def test_shapes_that_do_not_fit(tiny_model, tmp_path):
    save_random(tmp_path / "large", tiny_model, 48, 2, 4, 64)
    with pytest.raises(InputError, match="hidden_size is 48, needs 2 x 16 = 32"):
        run(tiny_model, tmp_path / "large", tmp_path / "enlarged")
    assert not (tmp_path / "enlarged").exists()
    with pytest.raises(InputError, match="not a model folder"):
        run(tmp_path / "nowhere", tmp_path / "large", tmp_path / "enlarged")


def test_a_broken_model_is_not_enlarged(tiny_model, tmp_path):
    vocabulary = load_vocabulary(tiny_model)
    broken = load_model(tiny_model)
    with torch.no_grad():
        broken.head_dense.weight[0, 0] = float("nan")
    save_model(tmp_path / "broken", broken, build_tokenizer(vocabulary, True, 10), vocabulary, {})
    with pytest.raises(InputError, match="logits differ by nan"):
        run(tmp_path / "broken", tmp_path / "broken", tmp_path / "enlarged", times=1)
    assert not (tmp_path / "enlarged").exists()
