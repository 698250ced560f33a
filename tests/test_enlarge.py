import json
import shutil

import pytest
import torch

import calculate_loss
import enlarge
from pcfg.common.files import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, load_vocabulary, save_model, weights_sha256
from pretraining.model.config import ModelConfig
from tests.bert_tokenizer import build_tokenizer


def save_random(folder, tiny_model, *shape):
    vocabulary = load_vocabulary(tiny_model)
    model = MaskedLM(ModelConfig(vocabulary.size, *shape, max_position_embeddings=10))
    save_model(folder, model, build_tokenizer(vocabulary, True, 10), vocabulary, {})


def run(small, large, target, *more):
    flags = {"--checkpoint-path": small, "--large-model-path": large, "--enlarged-model-path": target}
    enlarge.main([*(str(part) for pair in flags.items() for part in pair), *map(str, more)])


def measured_losses(folder, tiny_data, tiny_rules):
    """loss.json's value of every model under `folder`, by name."""
    data = {"--datafile": tiny_data / "test0.txt", "--vocabfile": "vocab.txt", "--rule-path": tiny_rules}
    calculate_loss.main(["--model-path", str(folder), *(str(part) for pair in data.items() for part in pair)])
    paths = sorted(folder.rglob("loss.json"))
    return {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())["value"] for path in paths}


def facts_of(folder):
    return json.loads((folder / "args.json").read_text())


@pytest.mark.parametrize("scale", ["tables", "head"])
@pytest.mark.parametrize("shape", [(32, 2, 4, 64), (32, 4, 2, 80)])
def test_loss_and_logits_are_the_small_models(tiny_model, tiny_data, tiny_rules, tmp_path, shape, scale, capsys):
    save_random(tmp_path / "large", tiny_model, *shape)
    shutil.copytree(tiny_model, tmp_path / "models" / "small")
    run(tiny_model, tmp_path / "large", tmp_path / "models" / "enlarged", "--time-enlarged", 2, "--tied-scale", scale)
    assert "largest difference of a logit" in capsys.readouterr().out
    small, large = load_model(tiny_model), load_model(tmp_path / "models" / "enlarged")
    ids = torch.randint(large.config.vocab_size, (16, 10))
    assert (small.predict(small.encode(ids)) - large.predict(large.encode(ids))).abs().max() < 1e-4
    assert large.config == load_model(tmp_path / "large").config
    losses = measured_losses(tmp_path / "models", tiny_data, tiny_rules)
    assert losses["small"] == pytest.approx(losses["enlarged"], abs=1e-5)
    facts = facts_of(tmp_path / "models" / "enlarged")
    differences = facts["enlarged"].pop("logit_differences")
    assert facts["enlarged"] == {
        "rule": scale,
        "times": 2,
        "heads": shape[2] // 2,
        "added_layers": list(range(2, shape[1])),
        "added_units": shape[3] - 64,
        "added_positions": 0,
        "from": {"weights_sha256": weights_sha256(tiny_model), "parameters": small.config.parameters},
    }
    assert facts["step"] == 0 and facts["parameters"] == large.config.parameters and "number_of_parameters" not in facts
    assert differences["rounding"] < 1e-12 and differences["float64"] < 1e-8 and 0 < differences["float32"] < 1e-4


def test_several_sizes_in_the_parameters_of_the_largest(tiny_model, tiny_data, tiny_rules, tmp_path):
    save_random(tmp_path / "models" / "middle" / "step1", tiny_model, 32, 3, 4, 64)
    save_random(tmp_path / "models" / "large" / "step1", tiny_model, 64, 3, 8, 128)
    shutil.copytree(tiny_model, tmp_path / "models" / "small" / "step1")
    folders = [tmp_path / "models" / name / "step1" for name in ("small", "middle", "large")]
    more = [part for folder in folders[1:] for part in ("--checkpoint-path", folder)]
    run(folders[0], folders[2], tmp_path / "as_large", *more)
    for folder, times in zip(folders, (4, 2, 1), strict=True):
        facts = facts_of(tmp_path / "as_large" / folder.relative_to(tmp_path / "models"))["enlarged"]
        assert (facts["times"], facts["from"]["weights_sha256"]) == (times, weights_sha256(folder))
    losses = [measured_losses(tmp_path / name, tiny_data, tiny_rules) for name in ("models", "as_large")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3
    configs = {load_model(path.parent).config for path in (tmp_path / "as_large").rglob("config.json")}
    assert len(configs) == 1
    with pytest.raises(InputError, match="was enlarged itself"):
        run(tmp_path / "as_large" / "small" / "step1", folders[2], tmp_path / "again")


def test_one_that_does_not_fit_leaves_nothing(tiny_model, tmp_path):
    save_random(tmp_path / "large", tiny_model, 32, 2, 4, 64)
    save_random(tmp_path / "odd", tiny_model, 24, 2, 2, 32)
    with pytest.raises(InputError, match=r"odd: the small model can't be seen.*hidden_size is 32, needs a multiple of 24"):
        run(tiny_model, tmp_path / "large", tmp_path / "enlarged", "--checkpoint-path", tmp_path / "odd")
    with pytest.raises(InputError, match="give different folders"):
        run(tiny_model, tmp_path / "large", tmp_path / "enlarged", "--checkpoint-path", tiny_model)
    with pytest.raises(InputError, match="--time-enlarged 3: the large model is 2 times as wide"):
        run(tiny_model, tmp_path / "large", tmp_path / "enlarged", "--time-enlarged", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"large", "odd"}


def test_inputs_are_never_overwritten(tiny_model, tmp_path):
    save_random(tmp_path / "large", tiny_model, 32, 2, 4, 64)
    before = (tmp_path / "large" / "model.safetensors").read_bytes()
    for target in (tmp_path / "large", tiny_model):
        with pytest.raises(InputError, match="exists already"):
            run(tiny_model, tmp_path / "large", target)
    assert (tmp_path / "large" / "model.safetensors").read_bytes() == before


def test_shapes_that_do_not_fit(tiny_model, tmp_path):
    save_random(tmp_path / "large", tiny_model, 40, 2, 4, 64)
    with pytest.raises(InputError, match="hidden_size is 40, needs a multiple of 16"):
        run(tiny_model, tmp_path / "large", tmp_path / "enlarged")
    assert not (tmp_path / "enlarged").exists()
    with pytest.raises(InputError, match="not a model folder"):
        run(tmp_path / "nowhere", tmp_path / "large", tmp_path / "enlarged")


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "head_dense.weight has entries that are not finite"), (3e38, "logits differ by (nan|inf)")],
)
def test_a_broken_model_is_not_enlarged(tiny_model, tmp_path, value, message):
    vocabulary = load_vocabulary(tiny_model)
    broken = load_model(tiny_model)
    with torch.no_grad():
        broken.head_dense.weight[0] = value
    save_model(tmp_path / "broken", broken, build_tokenizer(vocabulary, True, 10), vocabulary, {})
    with pytest.raises(InputError, match=message):
        run(tmp_path / "broken", tmp_path / "broken", tmp_path / "enlarged")
    assert not (tmp_path / "enlarged").exists()
