"""A BERT-style masked language model, pre-LN or post-LN, with tied embeddings.

Sources: Devlin et al. 2019 (post-LN); Xiong et al. 2020, section 3 (pre-LN); Izsak et al. 2021 ("academic budget BERT"), whose
pre-LN encoder has a LayerNorm after the embeddings and one after the last layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretraining.model.config import ModelConfig
from pretraining.model.layers import ACTIVATION_FUNCTIONS, Places, SelfAttention, layer_norm


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) int64 -> (batch, length, hidden)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Samples here are one segment: token type 0 everywhere.
        summed = self.words(input_ids) + self.positions(positions) + self.token_types.weight[0]
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

    def feed_forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.output(self.activation(self.intermediate(hidden))))

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None = None, places: Places = None) -> Tensor:
        """(batch, length, hidden) -> the same, or (M, 1, hidden) at `positions` (see `SelfAttention`)."""
        attended = self.attention(self.attention_norm(hidden) if self.pre_ln else hidden, mask, positions, places)
        if positions is not None:
            hidden = hidden.flatten(0, 1)[positions].unsqueeze(1)  # (M, 1, hidden)
        hidden = hidden + self.dropout(attended)
        if self.pre_ln:
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden)
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))


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
        self, input_ids: Tensor, input_mask: Tensor | None = None, positions: Tensor | None = None, places: Places = None
    ) -> Tensor:
        """Hidden states after the last LayerNorm: (batch, length, hidden), or (M, 1, hidden) for `positions`.

        Args:
            input_ids: (batch, length) int64.
            input_mask: (batch, length), 1 for a token, 0 for padding; None without padding. Results at padding have no meaning.
            positions: (M,) int64 indices into the flattened (batch * length) of the positions to return; None for all. The last
                layer computes these alone, since no later layer reads the others.
        """
        mask = None if input_mask is None else input_mask.bool()[:, None, None, :]  # (batch, 1, 1, length)
        hidden = self.embeddings(input_ids)  # (batch, length, hidden)
        *layers, last = self.layers
        for layer in layers:
            hidden = self._through(layer, hidden, mask)
        return self.final_norm(self._through(last, hidden, mask, positions, places))

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile fuse the layers' operations in training, for any batch size and sentence length."""
        torch._dynamo.config.recompile_limit = 64  # above the 5 graphs of training and those of an adversarial term
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)

    def _through(self, layer: nn.Module, *inputs: Tensor | Places) -> Tensor:
        """A layer's output; under activation checkpointing the backward pass recomputes its intermediate results."""
        if not self.training:
            return layer.forward(*inputs)  # not compiled: measurements have other shapes and no gradients
        if self.activation_checkpointing:
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

    def forward(self, input_ids: Tensor, input_mask: Tensor | None, positions: Tensor | None, places: Places = None) -> Tensor:
        """Logits (M, vocab_size) at `positions`, (M,) int64 indices into the flattened (batch * length).

        For None as `positions` it is `encode`: hidden states (batch, length, hidden) of all positions. DeepSpeed's engine
        passes on this method alone.
        """
        if positions is None:
            return self.encode(input_ids, input_mask)
        return self.predict(self.encode(input_ids, input_mask, positions, places).squeeze(1))
