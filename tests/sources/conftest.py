"""A tiny random OPT with a tokenizer of GPT-2's kind, trained on Python's own documentation."""

import pydoc_data.topics

import pytest
import torch

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


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    """A folder like facebook/opt-125m's: model of 640 tokens and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "opt"
    _make_opt(folder, 640)
    _make_tokenizer(LINES, 630).save_pretrained(folder)
    return folder
