"""A tiny random OPT with a tokenizer of GPT-2's kind, trained on Python's own documentation."""

import pydoc_data.topics

import pytest
import torch

from pretraining.sources.opt.causal_lm import RestrictedLM

LINES = [line for topic in pydoc_data.topics.topics.values() for line in topic.split("\n")]


def _make_tokenizer(lines, size):
    """GPT-2's kind of tokenizer: byte-level BPE, and OPT's special tokens with its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _make_opt(folder, size, seed=0, scale=1.0, positions=64):
    """Save a random OPT of 2 layers, 16 wide; `scale` of its weights decides how uneven its distributions are."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=size,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=positions,
        init_std=scale,
    )
    model = OPTForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def english():
    """Some 700 kB of English, as a list of lines."""
    return LINES


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(lines, size)`."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def make_opt():
    """`make_opt(folder, size, seed, scale, positions)`."""
    return _make_opt


def _log_joint(restricted: RestrictedLM, tokens: torch.Tensor) -> torch.Tensor:
    """log P(x) of whole sentences: (n, T) int64 columns -> (n,) float32 nats, by one forward pass without a cache."""
    number, length = tokens.shape
    if not 1 <= length <= restricted.max_tokens:
        raise ValueError(f"sentences of {length} tokens; they have 1 to {restricted.max_tokens}")
    start = torch.full((number, 1), restricted.start_id)
    fed = torch.cat([start, restricted.ids(tokens)], dim=1)[:, : restricted.max_tokens]
    with torch.inference_mode():
        logits = restricted.model(input_ids=fed, attention_mask=torch.ones_like(fed), use_cache=False).logits
    if length < restricted.max_tokens:
        tokens = torch.nn.functional.pad(tokens, (0, 1), value=restricted.end)
    first = restricted.log_probabilities(logits[:, :1], first=True)
    rest = restricted.log_probabilities(logits[:, 1:], first=False)
    log_p = torch.cat([first, rest], dim=1)  # (n, T or T + 1, V + 1)
    return log_p.gather(2, tokens[:, :, None])[:, :, 0].sum(dim=1)


@pytest.fixture(scope="session")
def log_joint():
    """`log_joint(restricted, tokens)`: the joint probability by its definition."""
    return _log_joint


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    """A folder like facebook/opt-125m's: model of 640 tokens and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "opt"
    _make_opt(folder, 640)
    _make_tokenizer(LINES, 630).save_pretrained(folder)
    return folder
