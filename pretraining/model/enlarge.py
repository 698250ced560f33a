"""A small transformer seen as a large one: the same function in the parameters of a model K times as wide, maybe deeper.

Liu et al. 2023, section 4.3 and appendix: traces of models of different sizes are compared in one parameterisation. The hidden
vector of the large model is K copies of the small one's, h' = (h, .., h). It follows that

    word, position and token-type tables    tiled K times along the hidden dimension and divided by K: the embedding LayerNorm
                                            restores the scale, and the tied decoder sums K copies of e h / K
    matrices W (out, in)                    tiled K x K and divided by K: sum over K copies of W h / K
    vectors (biases, LayerNorm)             tiled K times
    heads                                   K times as many of the same size: each copy attends by itself
    added layers                            all zero, LayerNorm weights included: h + 0 in pre-LN, after the last layer

up to rounding and the embedding LayerNorm's epsilon, which is not divided. The embeddings' scale is a choice on which the trace
depends; this one is the released code's.
"""

import dataclasses

import torch

from pcfg.artefacts import InputError
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

LOGIT_TOLERANCE = 1e-4  # float32, on random sentences
TABLES = ("embeddings.words.weight", "embeddings.positions.weight", "embeddings.token_types.weight")


def check_shapes(small: ModelConfig, large: ModelConfig, times: int) -> None:
    """Refuse a large model that the small one can't be seen as.

    Raises:
        InputError: names each number that is in the way, and what it would have to be.
    """
    problems = []
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        wanted = times * getattr(small, name)
        if getattr(large, name) != wanted:
            problems.append(f"{name} is {getattr(large, name)}, needs {times} x {getattr(small, name)} = {wanted}")
    for name in (
        *("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act"),
        *("encoder_ln_mode", "layer_norm_type", "layer_norm_eps"),
    ):
        if getattr(large, name) != getattr(small, name):
            problems.append(f"{name} is {getattr(large, name)!r}, the small model has {getattr(small, name)!r}")
    added = large.num_hidden_layers - small.num_hidden_layers
    if added < 0:
        problems.append(f"num_hidden_layers is {large.num_hidden_layers}, less than the small model's")
    if added > 0 and small.encoder_ln_mode != "pre-ln":
        problems.append("layers can be added to pre-LN models only: in post-LN a layer of zeros is not the identity")
    if problems:
        raise InputError("the small model can't be seen as the large one: " + "; ".join(problems))


def _tile(name: str, tensor: torch.Tensor, times: int) -> torch.Tensor:
    """The large model's parameter `name`; see the module's table."""
    if name == "decoder_bias":
        return tensor  # one number a word, of no hidden dimension
    if name in TABLES:
        return tensor.repeat(1, times) / times
    return tensor.repeat(times, times) / times if tensor.dim() == 2 else tensor.repeat(times)


def enlarge(small: MaskedLM, large_config: ModelConfig, times: int) -> MaskedLM:
    """The model of shape `large_config` that computes what `small` computes.

    Args:
        small: any `MaskedLM`; it is not changed.
        times: K, copies of the hidden vector.

    Returns:
        A new model in eval mode, of the small one's dtype; the small one's dropouts.

    Raises:
        InputError: the shapes do not fit, see `check_shapes`.
    """
    check_shapes(small.config, large_config, times)
    dropouts = {name: getattr(small.config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    large = MaskedLM(dataclasses.replace(large_config, **dropouts, attention=small.config.attention))
    large = large.to(next(small.parameters()).dtype)
    copied = {name: _tile(name, tensor, times) for name, tensor in small.state_dict().items()}
    added = {name: torch.zeros_like(tensor) for name, tensor in large.state_dict().items() if name not in copied}
    large.load_state_dict({**copied, **added})
    return large.eval()


@torch.inference_mode()
def largest_logit_difference(small: MaskedLM, large: MaskedLM, sentences: int = 64) -> float:
    """max |logits| difference over random sentences of every length that the models have positions for."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for length in range(1, small.config.max_position_embeddings + 1):
        ids = torch.randint(small.config.vocab_size, (max(1, sentences // length), length), generator=generator)
        logits = (model.predict(model.encode(ids)) for model in (small.eval(), large))
        differences.append(next(logits).sub_(next(logits)).abs().max())
    return torch.stack(differences).max().item()  # NaN if any is
