"""The obvious way to pre-train a masked language model: transformers' model in a plain loop, all sentences padded."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from pretraining.data.samples import Samples
from pretraining.model.config import ModelConfig

IGNORED = -100  # transformers' label of a position without a loss


class PlainLoop:
    """Steps of AdamW on `BertForMaskedLM`, each on one batch padded to the samples' max_seq_length.

    Args:
        config: shape and dropout; transformers has it in post-LN.
        samples: source of the batches.
        device: of the computation.
        sparse: whether logits are computed at the masked positions only.
        autocast: type of the arithmetic under autocast; None for float32.
    """

    def __init__(
        self, config: ModelConfig, samples: Samples, device: torch.device, sparse: bool, autocast: torch.dtype | None = None
    ):
        shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps")
        self.model = BertForMaskedLM(BertConfig(**{name: getattr(config, name) for name in (*shared, *dropout)}))
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.samples = samples
        self.device = device
        self.sparse = sparse
        self.autocast = autocast

    def loss(self, rows: np.ndarray) -> torch.Tensor:
        """Mean of -log f over the masked positions of the samples `rows`, in nats."""
        ids = torch.from_numpy(self.samples.input_ids[rows].astype(np.int64))
        mask = torch.from_numpy(self.samples.input_mask[rows].astype(np.int64))
        labels = torch.full_like(ids, IGNORED)  # (batch, max_seq_length)
        row, column = np.nonzero(self.samples.masked_lm_positions[rows])
        words = self.samples.masked_lm_ids[rows][row, column].astype(np.int64)
        labels[row, self.samples.masked_lm_positions[rows][row, column]] = torch.from_numpy(words)
        ids, mask, labels = (tensor.to(self.device) for tensor in (ids, mask, labels))
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if not self.sparse:
                return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            hidden = self.model.bert(input_ids=ids, attention_mask=mask)[0]
            is_masked = labels != IGNORED
            return F.cross_entropy(self.model.cls(hidden[is_masked]).float(), labels[is_masked])

    def step(self, rows: np.ndarray) -> None:
        """One update."""
        self.loss(rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
