"""The shape of a masked language model, and its translation to and from transformers' `config.json`."""

import dataclasses
import math
from typing import Any

from pcfg.common.files import InputError

ACTIVATIONS = ("gelu", "relu", "tanh", "swish")
LAYER_NORMS = ("pytorch", "apex", "rms_norm")
LAYER_NORM_MODES = ("pre-ln", "post-ln")
ATTENTIONS = ("sdpa", "eager", "apex")
# transformers has no BERT with RMSNorm: our own name makes its Auto classes refuse the folder by name.
RMS_NORM_MODEL_TYPE = "bert-rms-norm"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of `pretraining.model.bert.MaskedLM`, named as in transformers' `BertConfig`."""

    vocab_size: int  # rows of the word table, special tokens included
    hidden_size: int  # width of the hidden states; a multiple of num_attention_heads
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # width of the feed-forward layers
    hidden_act: str = "gelu"  # of the feed-forward layers; in post-LN also of the MLM head, which in pre-LN always has gelu
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512  # rows of the position table: the longest sentence, [CLS] and [SEP] included
    type_vocab_size: int = 2
    initializer_range: float = 0.02  # standard deviation of new weights
    layer_norm_eps: float = 1e-12
    layer_norm_type: str = "pytorch"  # pytorch and apex compute the same LayerNorm; rms_norm has neither mean nor bias
    encoder_ln_mode: str = "pre-ln"  # pre-ln normalises the input of each sub-layer, post-ln its sum with the input
    attention: str = "sdpa"  # how attention is computed; independent of the weights and not stored

    def __post_init__(self):
        for name, allowed in (
            ("hidden_act", ACTIVATIONS),
            ("layer_norm_type", LAYER_NORMS),
            ("encoder_ln_mode", LAYER_NORM_MODES),
            ("attention", ATTENTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            end = 1 if field.name.endswith("_prob") else math.inf
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise InputError(f"--{field.name}: {value!r} is not an integer of 1 or more")
            if field.type is float and (not isinstance(value, int | float) or not 0.0 <= value < end):
                raise InputError(f"--{field.name}: {value!r} is not a number in [0, {end})")
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise InputError(f"--hidden_size: {self.hidden_size} is not a multiple of --num_attention_heads {heads}")

    @property
    def parameters(self) -> int:
        """How many trainable numbers a model of this shape has, the tied table counted once.

        transformers counts `hidden_size` more in pre-LN (padding's position); the trace leaves out `vocab_size` (decoder_bias).
        """
        width = self.hidden_size
        norm = width if self.layer_norm_type == "rms_norm" else 2 * width
        tables = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * width
        dense = width * width + width
        layer = 4 * dense + self.intermediate_size * (2 * width + 1) + width + 2 * norm
        # Norms outside the layers: embeddings, head, and in pre-LN after the last layer.
        norms = (3 if self.encoder_ln_mode == "pre-ln" else 2) * norm
        return tables + self.num_hidden_layers * layer + norms + dense + self.vocab_size

    def to_transformers(self) -> dict:
        """The content of a `config.json` that transformers' Auto classes read.

        Pre-LN is `RobertaPreLayerNormForMaskedLM`, whose position ids are 1..T for a [PAD] id of 0: its position table has
        one more row. Post-LN is `BertForMaskedLM`.
        """
        fields = dataclasses.asdict(self)
        del fields["attention"]
        mode = fields.pop("encoder_ln_mode")
        norm = fields.pop("layer_norm_type")
        common = {"pad_token_id": 0, "tie_word_embeddings": True, "dtype": "float32", **fields}
        if norm == "rms_norm":
            return {**common, "model_type": RMS_NORM_MODEL_TYPE, "encoder_ln_mode": mode, "layer_norm_type": norm}
        if mode == "pre-ln":
            common["max_position_embeddings"] += 1
            architecture = {"model_type": "roberta-prelayernorm", "architectures": ["RobertaPreLayerNormForMaskedLM"]}
            return {**common, **architecture, "bos_token_id": None, "eos_token_id": None}
        return {**common, "model_type": "bert", "architectures": ["BertForMaskedLM"]}

    @classmethod
    def from_transformers(cls, content: dict, source: object, attention: str = "sdpa") -> "ModelConfig":
        """The configuration in a `config.json`, whose name `source` is for messages."""
        kind = content.get("model_type")
        own_mode = content.get("encoder_ln_mode")
        modes: dict[str, Any] = {"bert": "post-ln", "roberta-prelayernorm": "pre-ln", RMS_NORM_MODEL_TYPE: own_mode}
        if not isinstance(kind, str) or kind not in modes:
            raise InputError(f"{source}: model_type {kind!r} is not one of {', '.join(modes)}")
        for name, only in (("position_embedding_type", "absolute"), ("tie_word_embeddings", True), ("is_decoder", False)):
            if content.get(name, only) != only:
                raise InputError(f"{source}: {name} is {content[name]!r}; only models where it is {only!r} can be read")
        names = {field.name for field in dataclasses.fields(cls)} - {"attention", "encoder_ln_mode", "layer_norm_type"}
        values = {name: content[name] for name in names if name in content}
        if values.get("hidden_act") == "silu":
            values["hidden_act"] = "swish"  # two names of one function
        if kind == "roberta-prelayernorm":
            if content.get("pad_token_id") != 0:
                raise InputError(f"{source}: pad_token_id is {content.get('pad_token_id')}; only 0 can be read")
            positions = content.get("max_position_embeddings")
            if not isinstance(positions, int):
                raise InputError(f"{source}: max_position_embeddings is {positions!r}; it must be an integer")
            values["max_position_embeddings"] = positions - 1
        norm = "rms_norm" if kind == RMS_NORM_MODEL_TYPE else "pytorch"
        try:
            return cls(encoder_ln_mode=modes[kind], layer_norm_type=norm, attention=attention, **values)
        except (InputError, TypeError) as error:
            raise InputError(f"{source}: {error}") from None
