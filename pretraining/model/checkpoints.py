"""Model folders: `config.json`, weights, tokenizer files, `vocab.txt`, `args.json`; every measurement adds its own JSON file.

The folders are plain Hugging Face ones: pre-LN models load as `RobertaPreLayerNormForMaskedLM`, post-LN models as
`BertForMaskedLM`. Folders that transformers saved of these classes, or of `BertForPreTraining`, are model folders here. They
may have `tokenizer.json` instead of `vocab.txt`, more rows in the word table than words, and `pytorch_model.bin`, which is read
without executing pickled code. `args.json` lists the SHA-256 of the files that were saved with it: damaged files are refused.

    python -m pretraining.model.checkpoints verify FOLDER

checks that all model folders at or below FOLDER are intact and finite, and that no two have the same weights.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from pcfg.common import files
from pcfg.common.cli import Parser, run_main
from pcfg.common.files import AnyPath, InputError, check_file, read_json
from pretraining.data.vocabulary import TOKENIZER_FILE, VOCABULARY_FILE, Vocabulary, hub_is_off, save_tokenizer
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
FACTS_FILE = "args.json"
COOLED = "-cooled"  # after the name of a model folder: the same model with its learning rate let down to 0

# (our name, transformers' name) of modules; {base} is "bert" or "roberta_prelayernorm".
_COMMON = (
    ("embeddings.words", "{base}.embeddings.word_embeddings"),
    ("embeddings.positions", "{base}.embeddings.position_embeddings"),
    ("embeddings.token_types", "{base}.embeddings.token_type_embeddings"),
    ("embeddings.norm", "{base}.embeddings.LayerNorm"),
    *((f"layers.*.attention.{ours}", f"{{base}}.encoder.layer.*.attention.self.{ours}") for ours in ("query", "key", "value")),
    ("layers.*.attention.output", "{base}.encoder.layer.*.attention.output.dense"),
    ("layers.*.intermediate", "{base}.encoder.layer.*.intermediate.dense"),
    ("layers.*.output", "{base}.encoder.layer.*.output.dense"),
)
_PRE_LN = (
    ("layers.*.attention_norm", "{base}.encoder.layer.*.attention.LayerNorm"),
    ("layers.*.feed_forward_norm", "{base}.encoder.layer.*.intermediate.LayerNorm"),
    ("final_norm", "{base}.LayerNorm"),
    ("head_dense", "lm_head.dense"),
    ("head_norm", "lm_head.layer_norm"),
    ("decoder_bias", "lm_head.bias"),
)
_POST_LN = (
    ("layers.*.attention_norm", "{base}.encoder.layer.*.attention.output.LayerNorm"),
    ("layers.*.feed_forward_norm", "{base}.encoder.layer.*.output.LayerNorm"),
    ("head_dense", "cls.predictions.transform.dense"),
    ("head_norm", "cls.predictions.transform.LayerNorm"),
    ("decoder_bias", "cls.predictions.bias"),
)


def _stored_name(name: str, pre_ln: bool) -> str:
    """The name of our parameter `name` in transformers' class."""
    base = "roberta_prelayernorm" if pre_ln else "bert"
    for ours, theirs in (*_COMMON, *(_PRE_LN if pre_ln else _POST_LN)):
        pattern = re.escape(ours).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias|)"
        if match := re.fullmatch(pattern, name):
            *layer, kind = match.groups()
            return theirs.format(base=base).replace("*", layer[0] if layer else "") + kind
    raise KeyError(name)


def _split_names(name: str) -> list[str]:
    """The stored parts of our parameter `name`, in the order of their rows: three for the fused query, key, value."""
    return [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")] if ".qkv." in name else [name]


def to_stored(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names (pre-LN: the position table starts with an additional row, that of padding)."""
    pre_ln = config.encoder_ln_mode == "pre-ln"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        parts = _split_names(name)
        stored |= {_stored_name(part, pre_ln): rows for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}
    if pre_ln:
        key = _stored_name("embeddings.positions.weight", pre_ln)
        stored[key] = torch.cat([torch.zeros_like(stored[key][:1]), stored[key]])
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in stored.items()}


def from_stored(stored: dict[str, torch.Tensor], config: ModelConfig, source: object) -> dict[str, torch.Tensor]:
    """The inverse of `to_stored`; weights that our model lacks (pooler, next-sentence head) are left out."""
    pre_ln = config.encoder_ln_mode == "pre-ln"
    # Google's BERT weights on the hub still have TensorFlow's names of a LayerNorm.
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
    with torch.device("meta"):
        expected = MaskedLM(config).state_dict()
    _check_tied(stored, pre_ln, source)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        key = _stored_name(name, pre_ln)
        if key not in stored:
            raise InputError(f"{source}: has no weight {key!r}; does the {CONFIG_FILE} next to it belong to this model?")
        tensor = stored[key].to(torch.float32)
        if pre_ln and name == "embeddings.positions.weight":
            tensor = tensor[1:]
        if tensor.shape != shape:
            raise InputError(f"{source}: weight {key!r} has shape {tuple(tensor.shape)}, {CONFIG_FILE} says {shape}")
        return tensor

    state = {}
    for name, parameter in expected.items():
        parts = _split_names(name)
        shape = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        state[name] = torch.cat([read(part, shape) for part in parts])
    return state


def _check_tied(stored: dict[str, torch.Tensor], pre_ln: bool, source: object) -> None:
    """Refuse a separate decoder: ours is the word table. Files that transformers saved may contain a copy of it."""
    decoder = "lm_head.decoder" if pre_ln else "cls.predictions.decoder"
    for part, name in (("weight", "embeddings.words.weight"), ("bias", "decoder_bias")):
        own = stored.get(f"{decoder}.{part}")
        tied = stored.get(_stored_name(name, pre_ln))
        if own is not None and tied is not None and not torch.equal(own, tied):
            raise InputError(f"{source}: '{decoder}.{part}' is not that of the word table; only tied weights can be read")


def save_model(folder: AnyPath, model: MaskedLM, tokenizer: Any, vocabulary: Vocabulary, facts: dict) -> None:
    """Write a model folder, atomically; an existing one is replaced with all measurements in it.

    The tokenizer is that of the samples. The facts (arguments, step, samples seen, ...) are the content of `args.json`.
    """
    with files.atomic_folder(folder) as temporary:
        weights = to_stored(model.state_dict(), model.config)
        try:
            safetensors.torch.save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk
            raise InputError(f"{Path(folder) / WEIGHTS_FILE}: can't be written ({error}); free some space") from error
        files.write_json(temporary / CONFIG_FILE, model.config.to_transformers())
        save_tokenizer(temporary, tokenizer, vocabulary)
        files.write_sealed(temporary / FACTS_FILE, facts)


def weights_file(folder: AnyPath) -> Path:
    """The file with the weights of a folder: safetensors if it exists, else `pytorch_model.bin`."""
    path = Path(folder) / WEIGHTS_FILE
    return path if path.is_file() else Path(folder) / PICKLE_FILE


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The stored tensors of a weights file."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); make the model again") from None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged bytes: OSError, KeyError, UnicodeDecodeError, ...
        reason = type(error).__name__  # torch's own text is long, and advises to load the file unsafely
        raise InputError(
            f"{path}: refused, it holds more than tensors or is damaged ({reason}); make it again, or as {WEIGHTS_FILE}"
        ) from None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: holds a {type(stored).__name__}, not tensors by name; make it again")
    return {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)}


def load_model(
    folder: AnyPath, device: str | torch.device = "cpu", attention: str = "sdpa", weights: AnyPath | None = None
) -> MaskedLM:
    """The model of a folder, in float32 and eval mode; `weights`: a file that replaces the folder's, of the same shape.

    The one loader of all programs: files that an `args.json` next to them lists must be those that were saved, and all weights
    must be finite.
    """
    folder = Path(folder)
    if not is_model_folder(folder):
        raise InputError(f"{folder}: not a model folder ({CONFIG_FILE} and {WEIGHTS_FILE} or {PICKLE_FILE} are needed)")
    if (folder / FACTS_FILE).exists() and files.FILES not in read_facts(folder):
        print(f"warning: {folder / FACTS_FILE} lists no hashes: {folder} is used as it is")
    path = Path(weights or weights_file(folder))
    _check_files(folder, CONFIG_FILE)
    _check_files(path.parent, path.name)
    config = read_config(folder, attention)
    state = from_stored(_read_weights(path), config, path)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has entries that are not finite; the training has diverged, make the model again")
    model = MaskedLM(config)
    model.load_state_dict(state)
    return model.to(device).eval()


def is_model_folder(folder: AnyPath) -> bool:
    """Whether `folder` has a configuration and weights."""
    return weights_file(folder).is_file() and (Path(folder) / CONFIG_FILE).is_file()


def find_model(name: AnyPath) -> Path:
    """The folder that a user calls `name`: a local one, else a model of the hub (its local cache, unless HF_HUB_OFFLINE=0)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = [CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE, "tokenizer*"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=patterns, local_files_only=hub_is_off()))
        if not is_model_folder(folder):
            folder = Path(snapshot_download(str(name), allow_patterns=[PICKLE_FILE], local_files_only=hub_is_off()))
    except (OSError, ValueError) as error:
        off = "the hub is off; HF_HUB_OFFLINE=0 turns it on" if hub_is_off() else str(error).splitlines()[0]
        raise InputError(f"model {name}: no such folder, and not in the hub's local cache ({off}); give a folder") from None
    print(f"model: {name} from the hub, in {folder}")
    return folder


def model_folders(path: AnyPath) -> list[Path]:
    """The model folders at or below `path` that measurements take: without those that have a cooled one next to them."""
    return without_trunks(all_model_folders(path))


def without_trunks(folders: list[Path]) -> list[Path]:
    """The folders without each `stepN` whose `stepN-cooled` is among them as well."""
    names = {str(folder) for folder in folders}
    return [folder for folder in folders if f"{folder}{COOLED}" not in names]


def all_model_folders(path: AnyPath) -> list[Path]:
    """All model folders at or below `path`, in the order of their names, without hidden folders and training states."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a model folder, or one that holds model folders")
    folders = sorted(
        folder
        for folder in (config.parent for config in path.rglob(CONFIG_FILE))
        if is_model_folder(folder)
        and not any(part.startswith(".") or part == "training_state" for part in folder.relative_to(path).parts)
    )
    if not folders:
        raise InputError(f"{path}: no model folder in it ({CONFIG_FILE} with {WEIGHTS_FILE}); was anything saved there?")
    return folders


def read_facts(folder: AnyPath) -> dict:
    """The content of `args.json`, "files" being the hashes of the saved files; empty for a folder of other people."""
    path = Path(folder) / FACTS_FILE
    if not path.exists():
        return {}
    facts = read_json(path)
    # Without hashes: records of a lookup table, or a user who changed a file on purpose has removed them.
    return files.read_sealed(path) if files.FILES in facts else facts


def _check_files(folder: Path, *names: str) -> None:
    """Refuse files of a model folder that are not those saved with its `args.json`."""
    facts = read_facts(folder)
    path = folder / FACTS_FILE
    for name in names if files.FILES in facts else ():
        advice = f"make the model again, or, if it was changed on purpose, remove {files.FILES!r} there"
        check_file(folder / name, path, facts, advice)


def check_folder(folder: AnyPath) -> None:
    """Refuse a model folder with any file that is not the saved one; later measurements in it are not read."""
    _check_files(Path(folder), *(name for name in read_facts(folder).get(files.FILES, ()) if name != FACTS_FILE))


def read_config(folder: AnyPath, attention: str = "sdpa") -> ModelConfig:
    """The configuration of the model in `folder`."""
    path = Path(folder) / CONFIG_FILE
    return ModelConfig.from_transformers(read_json(path), path, attention)


def vocabulary_file(folder: AnyPath) -> Path:
    """The file with the model's vocabulary: `vocab.txt` if it exists, else `tokenizer.json`."""
    path = Path(folder) / VOCABULARY_FILE
    tokenizer = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        _check_files(Path(folder), VOCABULARY_FILE)
    if not path.is_file() and not tokenizer.is_file():
        raise InputError(f"{folder}: no {VOCABULARY_FILE} and no {TOKENIZER_FILE}; save the model's tokenizer in the folder")
    return path if path.is_file() else tokenizer


def load_vocabulary(folder: AnyPath) -> Vocabulary:
    """The vocabulary that the model of `folder` was trained with."""
    path = vocabulary_file(folder)
    _check_files(Path(folder), path.name)
    vocabulary = Vocabulary.read(path)
    rows = read_config(folder).vocab_size
    if vocabulary.size > rows:
        raise InputError(f"{path}: {vocabulary.size} words, but the model knows {rows}; is it the vocabulary of this model?")
    return vocabulary


def check_vocabulary(folder: AnyPath, vocabulary: Vocabulary, source: object) -> None:
    """Refuse a vocabulary that is not the model's: its ids would mean other words."""
    own = load_vocabulary(folder)
    if own.sha256 != vocabulary.sha256:
        raise InputError(
            f"{source}: {vocabulary.size} words with hash {vocabulary.sha256[:12]}, but the model was trained with "
            f"{vocabulary_file(folder)} ({own.size} words, hash {own.sha256[:12]}); give that one"
        )


def weights_sha256(folder: AnyPath) -> str:
    """Hash of the weights' file."""
    return files.sha256(weights_file(folder))


def describe_model(folder: AnyPath) -> dict[str, str]:
    """The facts of a model in a record of its measurements."""
    return {"sha256": weights_sha256(folder)}


def verify(root: AnyPath) -> list[str]:
    """The problems of the model folders at or below `root`, one line each; prints a line for each readable folder."""
    problems: list[str] = []
    owners: dict[str, Path] = {}
    for folder in all_model_folders(root):
        try:
            check_folder(folder)
            load_model(folder)
        except InputError as error:
            problems.append(str(error))
            continue
        digest = weights_sha256(folder)
        facts = read_facts(folder)
        if digest in owners:
            problems.append(f"{folder}: has the same weights as {owners[digest]}")
        owners.setdefault(digest, folder)
        known = f"step {facts.get('step')}" if files.FILES in facts else f"no hashes in {FACTS_FILE}: only read, made by others"
        print(f"{folder}: {known}, weights {digest[:12]}")
    return problems


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("verify",), help="read all model folders and report damaged or equal ones")
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or one that holds model folders")
    return parser


def main(arguments: list[str] | None = None) -> None:
    problems = verify(build_parser().parse_args(arguments).folder)
    if problems:
        raise InputError("\n".join([f"{len(problems)} problem(s)", *problems]))


if __name__ == "__main__":
    run_main(main)
