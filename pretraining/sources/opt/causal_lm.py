"""Causal language models of transformers, restricted to some of their tokens: a language whose probabilities are known.

Start token s, kept tokens K, end token e, maximum M. With p the model's softmax over K and e alone, a sentence x_1..x_T of
kept tokens, 1 <= T <= M, has the probability

    P(x) = prod_{i=1..T} p(x_i | s, x_<i)  *  p(e | s, x)   if T < M      (the sentence ended)
    P(x) = prod_{i=1..T} p(x_i | s, x_<i)                   if T = M      (it was cut at the length limit)

where p(. | s), the first token's, is over K alone: there is no empty sentence. These add up to 1 over all sentences (Liu et
al. 2023, section 3: their OPT data). The restriction is a JSON file, top_tokens.json, in the folder of the text.
"""

import copy
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch

from pcfg.common.files import InputError
from pcfg.common.schema import Schema, read_schema
from pretraining.data.vocabulary import hub_is_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch.backends.cuda.enable_cudnn_sdp(False)  # it takes half a second for each new shape, as every token of a batch has

TOP_TOKENS = "top_tokens.json"
FORMAT: Literal["top tokens, 1"] = "top tokens, 1"
NO_CACHE = "--model-name: the model keeps no keys and values of earlier tokens; give a transformer"
# Keys of a model's configuration that do not affect its outputs.
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def find_device(name: str | None) -> str:
    """The device of --device: cpu or cuda; for None cuda if available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none on this machine; leave it out, or give cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_causal_lm(name: str, device: str, dtype: torch.dtype) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", str]:
    """A causal language model without gradients, its tokenizer and `model_sha256`; no file of its folder is executed.

    Args:
        name: a local folder, or a name on the hub (its local cache only, unless the environment says HF_HUB_OFFLINE=0).
        dtype: of the model's arithmetic; the weights are read in float32 and converted.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model-name {name}: no config.json in this folder; give the folder of a causal language model")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise InputError(f"--model-name {name}: no such folder; give the folder of a causal language model, or its hub name")
    offline = hub_is_off()
    try:
        safety: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False, "weights_only": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **safety, dtype=torch.float32, output_loading_info=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"--model-name {name}: its weights hold more than tensors, and reading them could run a program "
            f"({_first_line(error)}); give weights in safetensors"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        off = "; the hub is off (HF_HUB_OFFLINE=0 turns it on)" if offline and not path.is_dir() else ""
        raise InputError(
            f"--model-name {name}: not a causal language model that can be loaded{off} ({_first_line(error)}); give the folder "
            "of one, or its name on the hub"
        ) from error
    model, report = loaded
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise InputError(
            f"--model-name {name}: its weights lack {missing[0]} ({len(missing)} such) that a {type(model).__name__} needs; "
            "give a model that was saved with its causal head"
        )
    model.eval().requires_grad_(False)
    digest = model_sha256(model)
    _check_causal(model, name)
    return model.to(device, dtype), _load_tokenizer(name, offline), digest


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _load_tokenizer(name: str, offline: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"--model-name {name}: its tokenizer can't be loaded ({_first_line(error)}); save it next to the model"
        ) from error
    # Without its files, transformers returns a tokenizer that knows special tokens only.
    if not tokenizer.is_fast or len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise InputError(
            f"--model-name {name}: no tokenizer.json, or vocab.json and merges.txt; save the tokenizer next to the model"
        )
    return tokenizer


def _check_causal(model: "PreTrainedModel", name: str) -> None:
    """Refuse a model whose earlier logits depend on a later token: transformers loads bidirectional encoders as well."""
    last = min(model.config.vocab_size, 8) - 1
    tokens = torch.tensor([[0, 1, 0, last], [0, 1, last, 0]])
    with torch.inference_mode():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :2]  # (2, 2, V)
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        raise InputError(
            f"--model-name {name}: no causal language model (tokens after a position change its logits); give one like GPT"
        )


def model_sha256(model: "PreTrainedModel") -> str:
    """Hexadecimal SHA-256 of a model's settings that are no defaults of its class, and of its weights as float32, by name."""
    facts = {key: value for key, value in model.config.to_diff_dict().items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(values.shape)}".encode())
        digest.update(values.numpy())
    return digest.hexdigest()


class Restriction(Schema):
    """The content of top_tokens.json: the tokens that a model is restricted to, and their origin."""

    format: Literal["top tokens, 1"]
    model_name: str  # as given on the command line; for people
    model_sha256: str  # see `model_sha256`
    kept: list[pydantic.NonNegativeInt]  # (V,) ids of the kept tokens in the model's vocabulary, the most frequent first
    pieces: list[str]  # (V,) the same as words of the text (`escaped_tokens`); kept[i] has the id i + 5 in vocab.txt
    counts: list[pydantic.NonNegativeInt]  # (V,) occurrences of each in the sample
    start_id: pydantic.NonNegativeInt  # of the start token in the model's vocabulary
    end_id: pydantic.NonNegativeInt  # of the end token, likewise
    max_tokens: pydantic.PositiveInt  # maximum number of tokens per sentence (M above), without start and end token
    estimated: dict[str, Any]  # origin of the counts: seed, sentences, tokens, device, dtype

    @pydantic.model_validator(mode="after")
    def _check_lists(self) -> "Restriction":
        kept = self.kept
        if not 0 < len(kept) == len(set(kept)) == len(self.pieces) == len(self.counts) or self.end_id in kept:
            raise ValueError("kept tokens, pieces and counts do not fit together")
        return self


def read_restriction(path: Path | str) -> Restriction:
    """The restriction in a folder of text, or in a file."""
    path = Path(path) / TOP_TOKENS if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is written by generate_pretraining.py --source opt")
    return read_schema(Restriction, path, "damaged, or of another version: make it again")


def check_model(restriction: Restriction, source: Path | str, model_name: str, digest: str) -> None:
    """Refuse a model, named on the command line, that is not the one of the restriction in `source`."""
    if restriction.model_sha256 != digest:
        raise InputError(
            f"--model-name {model_name}: {source} is of another model, {restriction.model_name} (sha256 "
            f"{restriction.model_sha256[:12]}, this one's {digest[:12]}); give that one, or make the tokens again elsewhere"
        )


class RestrictedLM:
    """A causal model of transformers restricted to its kept tokens; the arguments are those of `Restriction`.

    Tokens are columns everywhere: column j stands for the token `kept[j]`, the last one, `end` = V, for the end token. The
    attribute `model` takes the model's own ids (`ids`), and its logits go to `log_probabilities` as they are.
    """

    def __init__(self, model: "PreTrainedModel", kept: Sequence[int], start_id: int, end_id: int, max_tokens: int):
        self.device = next(model.parameters()).device
        self.start_id = start_id
        self.max_tokens = max_tokens
        self.end = len(kept)
        self._columns = torch.tensor([*kept, end_id], device=self.device)  # (V + 1,)
        self.kept = self._columns[:-1]
        size = model.config.vocab_size
        if max(start_id, int(self._columns.max())) >= size:
            raise InputError(f"top tokens: the model has the ids 0..{size - 1} only; give the model that they were made with")
        # The end token is never an input, so at most the start token and M - 1 others are.
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise InputError(
                f"--length-limit {max_tokens + 1}: the model has {positions} positions; give at most {positions + 1}"
            )
        self.model = _with_restricted_head(model, self._columns)
        self._is_head_restricted = self.model is not model

    @classmethod
    def of(cls, model: "PreTrainedModel", restriction: Restriction) -> "RestrictedLM":
        """The language of a restriction and its model."""
        return cls(model, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens)

    def ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Columns as ids of the model's vocabulary, of the same shape, int64."""
        return self._columns[tokens]

    def log_probabilities(self, logits: torch.Tensor, first: bool) -> torch.Tensor:
        """log p over kept tokens and end token, (..., V + 1) float32 nats, from `logits` (..., W) of `model`.

        `first`: they are of the position after the start token, where a sentence can't end: the last column is -inf.
        """
        logits = (logits if self._is_head_restricted else logits[..., self._columns]).float()
        if first:
            logits = logits.clone()
            logits[..., self.end] = -torch.inf
        return torch.log_softmax(logits, dim=-1)


def _with_restricted_head(model: "PreTrainedModel", columns: torch.Tensor) -> "PreTrainedModel":
    """A copy of `model` that shares its weights and computes the logits of `columns` only, two thirds of OPT-125M's work.

    It is the model itself if that has no plain linear output layer as a direct child.
    """
    head = model.get_output_embeddings()
    name = next((name for name, child in model.named_children() if child is head), None)
    if type(head) is not torch.nn.Linear or name is None:
        return model
    restricted = torch.nn.Linear(head.in_features, len(columns), bias=False, device="meta")
    restricted.weight = torch.nn.Parameter(head.weight[columns], requires_grad=False)
    restricted.bias = None if head.bias is None else torch.nn.Parameter(head.bias[columns], requires_grad=False)
    shared = copy.copy(model)
    shared._modules = {**model._modules, name: restricted}
    return shared
