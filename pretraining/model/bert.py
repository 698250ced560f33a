"""A BERT-style masked language model, pre-LN or post-LN, with tied embeddings.

Sources: Devlin et al. 2019 (post-LN); Xiong et al. 2020, section 3 (pre-LN); Izsak et al. 2021 ("academic budget BERT"), whose
pre-LN encoder has a LayerNorm after the embeddings and one after the last layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretraining.model.config import ModelConfig
from pretraining.model.layers import ACTIVATION_FUNCTIONS, Blocks, SelfAttention, layer_norm


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Of tokens and their positions in the sentences, int64 of one shape: (..., hidden)."""
        # Samples here are one segment: token type 0 everywhere.
        summed = self.words(input_ids) + self.positions(position_ids) + self.token_types.weight[0]
        return self.dropout(self.norm(summed))


class Layer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection.

    Pre-LN: h + f(LN(h)). Post-LN: LN(h + f(h)).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre_ln = config.encoder_ln_mode == "pre-ln"
        self.attention_norm = layer_norm(config)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = layer_norm(config)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.compiled: list[Callable] = []

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the two methods around attention, for training: measurements have other shapes and no gradients."""
        self.compiled = [torch.compile(half, *arguments, **options) for half in (self.before_attention, self.after_attention)]

    def before_attention(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values: (..., hidden) -> (..., 3 hidden)."""
        return self.attention.qkv(self.attention_norm(hidden) if self.pre_ln else hidden)

    def after_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        """The layer's output from its input and the contexts of `SelfAttention`, all (..., hidden)."""
        hidden = hidden + self.dropout(self.attention.output(context))
        if self.pre_ln:
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden)
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.output(self.activation(self.intermediate(hidden))))

    def forward(self, hidden: Tensor, blocks: Blocks, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """(..., hidden) of N tokens -> the same, or (M, hidden) at `positions`; blocks and mask as in `SelfAttention`."""
        before, after = self.before_attention, self.after_attention
        if self.compiled and self.training:
            before, after = self.compiled
        context = self.attention(before(hidden).flatten(0, -2), blocks, mask)
        if positions is not None:
            return after(hidden.flatten(0, -2)[positions], context[positions])
        # A view of a tensor is another graph for torch.compile.
        return after(hidden, context if hidden.dim() == 2 else context.view(hidden.shape))


class MaskedLM(nn.Module):
    """An encoder and the MLM head: f_theta(x_-t)[w] = softmax(E g(h_t) + b)[w], E the word table itself (tied weights).

    The last layer and the head compute the masked positions only; no other position is ever predicted.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Whether training stores only the layers' inputs for the backward pass (Chen et al. 2016).
        self.activation_checkpointing = False
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = layer_norm(config) if config.encoder_ln_mode == "pre-ln" else nn.Identity()
        self.head_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = layer_norm(config)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.head_activation = F.gelu if config.encoder_ln_mode == "pre-ln" else ACTIVATION_FUNCTIONS[config.hidden_act]
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """BERT's initialisation: normal weights of standard deviation `initializer_range`, zero biases."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(
        self,
        input_ids: Tensor,
        input_mask: Tensor | None = None,
        positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """Hidden states after the last LayerNorm: those of all N tokens, of the shape of `input_ids`, or (M, hidden).

        The tokens are a batch of sentences padded to one length, or sentences packed one after the other, whose `position_ids`
        and `blocks` (see `SelfAttention`) are given.

        Args:
            input_ids: (batch, length) or (N,) int64.
            input_mask: of the same shape, not 0 for a token, 0 for padding; None without padding. Results at padding have no
                meaning.
            positions: (M,) int64 indices into the N tokens of those to return; None for all. The last layer computes these
                alone, since no later layer reads the others.
        """
        if position_ids is None or blocks is None:
            sentences, length = input_ids.shape
            position_ids = torch.arange(length, device=input_ids.device)
            blocks = [(sentences, length, input_mask is not None)]
        mask = None if input_mask is None else input_mask.bool().flatten()
        hidden = self.embeddings(input_ids, position_ids)
        *layers, last = self.layers
        for layer in layers:
            hidden = self._through(layer, hidden, blocks, mask)
        return self.final_norm(self._through(last, hidden, blocks, mask, positions))

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse the layers' operations outside attention in training, for any number of tokens."""
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)

    def _through(self, layer: nn.Module, *inputs: Tensor | Blocks | None) -> Tensor:
        """A layer's output; under activation checkpointing the backward pass recomputes its intermediate results."""
        if self.training and self.activation_checkpointing:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def transform(self, hidden: Tensor) -> Tensor:
        """g(h), (..., hidden): the input of the tied decoder."""
        return self.head_norm(self.head_activation(self.head_dense(hidden)))

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of the words at positions with hidden states (..., hidden)."""
        weight, bias = self.embeddings.words.weight, self.decoder_bias
        if not torch.is_autocast_enabled("cuda"):
            return F.linear(self.transform(hidden), weight, bias)
        # A product with rows of other lengths takes a slow kernel.
        rows = -len(weight) % 64
        logits = F.linear(self.transform(hidden), F.pad(weight, (0, 0, 0, rows)), F.pad(bias, (0, rows)))
        return logits[..., : len(weight)]

    def forward(
        self,
        input_ids: Tensor,
        input_mask: Tensor | None,
        positions: Tensor | None,
        position_ids: Tensor | None = None,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """Logits (M, vocab_size) at `positions`; `encode`, whose arguments these are, for None as `positions`.

        DeepSpeed's engine passes on this method alone.
        """
        hidden = self.encode(input_ids, input_mask, positions, position_ids, blocks)
        return hidden if positions is None else self.predict(hidden)
