"""Causal language models of transformers, restricted to some of their tokens: a language whose probabilities are known.

Start token s, kept tokens K, end token e. With p the model's softmax over K and e alone, a sentence x_1..x_T of kept tokens,
1 <= T <= M, has the probability

    P(x) = prod_{i=1..T} p(x_i | s, x_<i)  *  p(e | s, x)   if T < M      (the sentence ended)
    P(x) = prod_{i=1..T} p(x_i | s, x_<i)                   if T = M      (it was cut at the length limit)

where p(. | s), the first token's, is over K alone: there is no empty sentence. These add up to 1 over all sentences (Liu et
al. 2023, section 3: their OPT data). The restriction is a JSON file, top_tokens.json, in the folder of the text.
"""

import copy
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import torch

from pcfg.common.files import InputError, read_json, write_json
from pretraining.data.vocabulary import hub_is_off

TOP_TOKENS = "top_tokens.json"
FORMAT = "top tokens, 1"
# Keys of a model's configuration that say nothing of its function.
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def find_device(wanted: str | None) -> str:
    """The device of --device: cpu or cuda; for None cuda where it is.

    Raises:
        InputError: cuda is wanted and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none on this machine; leave it out, or give cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def load_causal_lm(name: str, device: str, dtype: torch.dtype) -> tuple:
    """A causal language model and its tokenizer; no code of the model's folder is executed, nor anything pickled in it.

    Args:
        name: a local folder, or a name on the hub (its local cache only, unless the environment says HF_HUB_OFFLINE=0).
        device: cpu or cuda.
        dtype: that the model computes in; it is read in float32 and converted.

    Returns:
        model, in evaluation mode and without gradients; tokenizer, a fast one; sha256, of the configuration (what differs from
        its class's defaults) and of the weights as float32, so that the kind of weights file does not matter.

    Raises:
        InputError: there is no such model, it is damaged, refused as unsafe, no causal language model, or has no tokenizer.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(name)
    offline = hub_is_off()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            local_files_only=offline,
            trust_remote_code=False,
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--model-name {name}: its weights hold more than tensors, and reading them could run a program ({reason}); take "
            "weights in safetensors"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        off = "; the hub is off (HF_HUB_OFFLINE=0 turns it on)" if offline and not Path(name).is_dir() else ""
        raise InputError(
            f"--model-name {name}: not a causal language model that can be loaded{off} ({reason}); give the folder of one, or "
            "its name on the hub"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise InputError(
            f"--model-name {name}: its weights lack {lacking[0]} ({len(lacking)} such) that a {type(model).__name__} needs; "
            "take a model that was saved with its causal head"
        )
    model.eval().requires_grad_(False)
    digest = model_sha256(model)
    _check_causal(model, name)
    return model.to(device, dtype), _load_tokenizer(name, offline), digest


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model-name {name}: no config.json in this folder; give the folder of a causal language model")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise InputError(f"--model-name {name}: no such folder; give the folder of a causal language model, or its hub name")


def _load_tokenizer(name: str, offline: bool):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--model-name {name}: its tokenizer can't be loaded ({reason}); save it beside the model") from error
    # without its files transformers gives one that knows special tokens only
    if not tokenizer.is_fast or len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise InputError(f"--model-name {name}: no tokenizer.json, or vocab.json and merges.txt; save the tokenizer beside it")
    return tokenizer


def _check_causal(model: torch.nn.Module, name: str) -> None:
    """transformers also takes bidirectional encoders for causal models: see whether a later token changes earlier logits."""
    last = min(model.config.vocab_size, 8) - 1
    tokens = torch.tensor([[0, 1, 0, last], [0, 1, last, 0]])
    with torch.inference_mode():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :2]  # (2, 2, V)
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
        raise InputError(
            f"--model-name {name}: no causal language model (tokens after a position change its logits); take one of GPT's kind"
        )


def model_sha256(model: torch.nn.Module) -> str:
    """Hexadecimal SHA-256 of a model's configuration and of its weights, as float32, in the order of their names."""
    facts = {key: value for key, value in model.config.to_diff_dict().items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(values.shape)}".encode())
        digest.update(values.numpy())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Restriction:
    """What top_tokens.json says: to which tokens a model is restricted, and how they were found.

    Args:
        model_name: as it was given; for people.
        model_sha256: see `load_causal_lm`.
        kept: (V,) ids of the kept tokens in the model's vocabulary, the most frequent first.
        pieces: (V,) the same as words of the text (`pretraining.sources.opt.escaped_tokens`); kept[i] has the id i + 5 in
            vocab.txt.
        counts: (V,) how often each was seen in the sample.
        start_id, end_id: ids of the start and the end token in the model's vocabulary.
        max_tokens: most tokens a sentence (M above), start and end token not counted.
        estimated: how the counts were had: seed, sentences, tokens, device, dtype.
    """

    model_name: str
    model_sha256: str
    kept: list[int]
    pieces: list[str]
    counts: list[int]
    start_id: int
    end_id: int
    max_tokens: int
    estimated: dict

    def write(self, folder) -> None:
        """Write top_tokens.json into a folder, atomically."""
        write_json(Path(folder) / TOP_TOKENS, {"format": FORMAT, **dataclasses.asdict(self)})


def read_restriction(path) -> Restriction:
    """The restriction in a folder of text, or in a file.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOP_TOKENS
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is written by generate_pretraining.py --source opt")
    content = read_json(path)
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a file of this version's top tokens ({FORMAT!r}); make it again")
    try:
        restriction = Restriction(**content)
    except TypeError as error:
        raise InputError(f"{path}: damaged ({error}); make it again") from None
    _check(restriction, path)
    return restriction


def _check(restriction: Restriction, path: Path) -> None:
    def integers(values) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    kept, scalars = restriction.kept, [restriction.start_id, restriction.end_id, restriction.max_tokens]
    sound = integers(kept) and integers(restriction.counts) and integers(scalars) and isinstance(restriction.pieces, list)
    sound = sound and 0 < len(kept) == len(set(kept)) == len(restriction.pieces) == len(restriction.counts)
    if not sound or restriction.end_id in kept or restriction.max_tokens < 1:
        raise InputError(f"{path}: damaged (kept tokens, pieces and counts do not fit together); make it again")


class RestrictedLM:
    """A causal model restricted to its kept tokens.

    Tokens are columns everywhere: column j stands for the token `kept[j]`, the last one, `end` = V, for the end token.

    Args:
        model: of transformers, in evaluation mode. It is left as it is; where its output layer is a plain linear one, this
            object's copy has the rows of kept tokens and end token alone and shares all other weights.
        kept: (V,) ids of the kept tokens in the model's vocabulary.
        start_id, end_id, max_tokens: as in `Restriction`.

    Attributes:
        model: to be called as transformers' models are, with the model's ids (`ids`) and `past_key_values`; its logits go to
            `log_probabilities` as they are.
        kept: (V,) int64 on the device.
        start_id, end_id, max_tokens, device: as given.
        end: V, the column of the end token.

    Raises:
        InputError: the model has no such tokens, or fewer positions than max_tokens.
    """

    def __init__(self, model: torch.nn.Module, kept, start_id: int, end_id: int, max_tokens: int):
        self.device = next(model.parameters()).device
        self.kept = torch.as_tensor(kept, dtype=torch.int64, device=self.device)
        self.start_id, self.end_id, self.max_tokens, self.end = start_id, end_id, max_tokens, len(self.kept)
        size = model.config.vocab_size
        if max(start_id, end_id, *self.kept.tolist()) >= size:
            raise InputError(f"top tokens: the model has the ids 0..{size - 1} only; take the model that they were made with")
        # the end token is never fed, so that start and M - 1 tokens are the most
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise InputError(
                f"--length-limit {max_tokens + 1}: the model has {positions} positions; give at most {positions + 1}"
            )
        self._columns = torch.cat([self.kept, torch.tensor([end_id], device=self.device)])  # (V + 1,)
        self.model = _with_restricted_head(model, self._columns)
        self._is_head_restricted = self.model is not model

    @classmethod
    def from_folder(cls, folder, model_name: str, device: str, dtype: torch.dtype) -> "RestrictedLM":
        """The language that the text in a folder was drawn from.

        Args:
            folder: a folder of text with a top_tokens.json.
            model_name, device, dtype: as `load_causal_lm`.

        Raises:
            InputError: as `load_causal_lm` and `read_restriction`; the text was made with another model.
        """
        restriction = read_restriction(folder)
        model, _, digest = load_causal_lm(model_name, device, dtype)
        check_model(restriction, folder, model_name, digest)
        return cls(model, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens)

    def ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Columns as ids of the model's vocabulary, of the same shape, int64."""
        return self._columns[tokens]

    def log_probabilities(self, logits: torch.Tensor, first: bool) -> torch.Tensor:
        """log p over kept tokens and end token.

        Args:
            logits: (..., W) of `model`.
            first: whether they are of the position after the start token, where a sentence can't end.

        Returns:
            (..., V + 1) float32 nats; the end token's, the last column, is -inf if `first`.
        """
        logits = (logits if self._is_head_restricted else logits[..., self._columns]).float()
        if first:
            logits = logits.clone()
            logits[..., self.end] = -torch.inf
        return torch.log_softmax(logits, dim=-1)

    @torch.inference_mode()
    def log_joint(self, tokens: torch.Tensor) -> torch.Tensor:
        """log P(x) of whole sentences, by one forward pass.

        Args:
            tokens: (n, T) int64 columns, 0 to V - 1; 1 <= T <= max_tokens.

        Returns:
            (n,) float32 nats: sum_i log p(x_i | s, x_<i), and log p(e | s, x) if T < max_tokens.
        """
        number, length = tokens.shape
        if not 1 <= length <= self.max_tokens:
            raise ValueError(f"sentences of {length} tokens; they have 1 to {self.max_tokens}")
        start = torch.full((number, 1), self.start_id, device=self.device)
        fed = torch.cat([start, self.ids(tokens.to(self.device))], dim=1)[:, : self.max_tokens]
        logits = self.model(input_ids=fed, attention_mask=torch.ones_like(fed), use_cache=False).logits
        targets = tokens.to(self.device)
        if length < self.max_tokens:
            targets = torch.nn.functional.pad(targets, (0, 1), value=self.end)
        first = self.log_probabilities(logits[:, :1], first=True)
        rest = self.log_probabilities(logits[:, 1:], first=False)
        log_p = torch.cat([first, rest], dim=1)  # (n, T or T + 1, V + 1)
        return log_p.gather(2, targets[:, :, None])[:, :, 0].sum(dim=1)


def check_model(restriction: Restriction, source, model_name: str, digest: str) -> None:
    """Refuse a model that is not the one of a restriction.

    Raises:
        InputError: names both.
    """
    if restriction.model_sha256 != digest:
        raise InputError(
            f"--model-name {model_name}: {source} is of another model, {restriction.model_name} (sha256 "
            f"{restriction.model_sha256[:12]}, this one's {digest[:12]}); give that one, or make the tokens again elsewhere"
        )


def _with_restricted_head(model: torch.nn.Module, columns: torch.Tensor) -> torch.nn.Module:
    """A copy of `model` that shares its weights and computes the logits of `columns` only; the model itself if it has no
    plain linear output layer as a direct child. A third of OPT-125m's work is logits of tokens that are not kept.
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
