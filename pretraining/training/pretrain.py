"""A pre-training run from the command line's options: where it begins, what it needs, and its end."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pcfg.common.files import InputError, disk_errors, keyed_rng, versions
from pcfg.common.ranks import Ranks
from pretraining.data.vocabulary import Vocabulary, resolve_tokenizer
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import (
    FACTS_FILE,
    check_folder,
    check_vocabulary,
    describe_model,
    find_model,
    load_model,
    read_config,
    read_facts,
)
from pretraining.model.config import ModelConfig
from pretraining.training import state
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.arguments import check_accumulation, differences, job_folder, model_config
from pretraining.training.engine import build_engine, precision, start_ranks, zero_stage
from pretraining.training.metrics import METRICS_FILE
from pretraining.training.sample_stream import Shards
from pretraining.training.state import Found, Progress
from pretraining.training.trainer import STATE_FOLDER, Data, Trainer
from pretraining.training.validation import GapMeter

# Of a model's configuration: what may change between a training state and the run that goes on from it.
FREE_TO_CHANGE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "attention")


def finished_model(job: Path, arguments: dict) -> Path | None:
    """The final model folder, whole, of an earlier run with the same deciding arguments, or None."""
    for path in sorted(job.glob(f"step*/{FACTS_FILE}")):
        try:
            facts = read_facts(path.parent)
            if facts.get("final") and not differences(facts.get("arguments", {}), arguments):
                check_folder(path.parent)
                return path.parent
        except InputError as error:
            print(f"warning: {error}")
    return None


def starting_state(options: argparse.Namespace, job: Path) -> Found | None:
    """The training state to go on from: the run's own, else that of `--load_training_checkpoint`, else None.

    Raises:
        InputError: a run with other arguments has been here, there is no such state, or none is whole.
    """
    arguments, changes = vars(options), {}
    own, elsewhere = _own_state(options, job), options.load_training_checkpoint
    if own is not None:
        changes[own.folder] = differences(own.saved["arguments"], arguments)
        if not changes[own.folder]:
            return own
    if elsewhere:
        root = Path(elsewhere)
        if options.overwrite and root.resolve().is_relative_to(job.resolve()):
            raise InputError(f"--overwrite: would delete the state that is to be loaded, {root}; leave one of them out")
        return state.find(root, options.load_checkpoint_id)
    if options.overwrite:
        return None
    for path in sorted(job.glob(f"step*/{FACTS_FILE}")):
        changes[path.parent] = differences(read_facts(path.parent).get("arguments", {}), arguments)
    for path, changed in changes.items():
        if changed:
            raise InputError(
                f"{path}: from a run with other arguments ({changed}); give another --job_name, --overwrite to delete what "
                f"is in {job}, or --load_training_checkpoint {job / STATE_FOLDER} to go on from there with the new ones"
            )
    return None


def _own_state(options: argparse.Namespace, job: Path) -> Found | None:
    """The newest whole state that earlier runs left in the folder `job`, unless `--resume never`."""
    if options.resume == "never":
        left = [*job.glob("step*"), *job.glob(STATE_FOLDER)]
        if left and not options.overwrite:
            raise InputError(
                f"--resume never: {left[0]} is there; add --overwrite to delete what a run left, or another --job_name"
            )
        return None
    try:
        return state.newest(job / STATE_FOLDER)
    except InputError as error:
        if not options.overwrite and not options.load_training_checkpoint:
            raise
        print(f"warning: {error}")
        return None


def agreed_state(options: argparse.Namespace, job: Path, ranks: Ranks) -> Found | None:
    """`starting_state`, looked for by the main rank alone and told to the others; its InputError is raised on all ranks."""
    answer = {}
    if ranks.is_main:
        try:
            found = starting_state(options, job)
            if found is not None:
                answer = {"folder": str(found.folder), "saved": found.saved, "damaged": [str(path) for path in found.damaged]}
        except InputError as error:
            answer = {"error": str(error)}
    answer = json.loads(ranks.agree_on_text(json.dumps(answer)))
    if "error" in answer:
        raise InputError(answer["error"])
    return Found(Path(answer["folder"]), answer["saved"], [Path(path) for path in answer["damaged"]]) if answer else None


def clear(job: Path) -> None:
    """Delete what a run has left in its folder, and nothing else."""
    for path in [*job.glob("step*"), job / STATE_FOLDER]:
        if path.is_dir():
            shutil.rmtree(path)
    (job / METRICS_FILE).unlink(missing_ok=True)


def prepare(options: argparse.Namespace, job: Path, found: Found | None) -> None:
    """Make the run's folder ready: what is to be deleted, was found damaged or is half done is out of the way."""
    if options.overwrite and found is None:
        clear(job)
    if found is not None and found.folder.parent == job / STATE_FOLDER and not options.load_checkpoint_id:
        state.tidy(found, options.keep_checkpoints)
    for left in job.glob(".step*.tmp"):  # model folders that a kill left half written
        shutil.rmtree(left)
    with disk_errors(job):
        job.mkdir(parents=True, exist_ok=True)


def git_revision() -> str | None:
    """The project's commit, None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def load_data(options: argparse.Namespace, gap_meter: GapMeter | None = None) -> tuple[Data, int]:
    """Tokenizer and shards, checked against each other, and the samples' `max_seq_length`; `gap_meter` as in `pretrain`."""
    tokenizer = resolve_tokenizer(options.tokenizer_name, beside=[Path(options.dataset_path)])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    dynamic = options.seed if options.dynamic_masking else None
    train = Shards(options.dataset_path, "train", vocabulary, dynamic=dynamic)
    number = options.validation_shards
    test = Shards(options.dataset_path, "test", vocabulary, first=number) if options.do_validation else None
    length = max(shards.max_seq_length for shards in (train, test) if shards is not None)
    if options.max_position_embeddings is not None and options.max_position_embeddings < length:
        raise InputError(
            f"--max_position_embeddings: {options.max_position_embeddings}, but the samples in {options.dataset_path} have "
            f"{length} tokens (max_seq_length); give {length} or more"
        )
    gap = None
    if options.rule_path:
        if gap_meter is None:
            raise ValueError("--rule-path needs a gap_meter, pretraining.evaluation.gap.GapMeter")
        gap = gap_meter(options.rule_path, options.gap_sentences, vocabulary, length, options.seed)
    adversarial = AdversarialTerm.from_options(options, vocabulary, length)
    facts = {
        "job_name": options.job_name,
        "seed": options.seed,
        "vocabulary_sha256": vocabulary.sha256,
        "git_revision": git_revision(),
        "versions": versions("torch", "deepspeed", "transformers"),
        "arguments": vars(options),
    }
    if adversarial is not None:
        facts["adversarial"] = adversarial.facts
    return Data(train, test, gap, tokenizer, facts, adversarial), length


def check_fits(saved: dict, folder: Path, facts: dict) -> None:
    """Refuse a training state of another model, vocabulary, optimizer or, where it is split over them, number of ranks.

    So is one of a run with the same arguments whose labelled file has been changed since.

    Raises:
        InputError: names what differs.
    """

    is_same_run = not differences(saved["arguments"], facts["arguments"])

    def relevant(content: dict) -> dict:
        shape = {name: value for name, value in content["model"].items() if name not in FREE_TO_CHANGE}
        return shape | {
            "vocabulary": content["vocabulary_sha256"],
            "optimizer_type": content["arguments"]["optimizer_type"],
            "zero_stage": content["zero_stage"],
            "float16": content["precision"] == "float16",
            "ranks": content["world_size"] if content["zero_stage"] else "any",
            "the SHA-256 of --adversarial_file": content.get("adversarial", {}).get("sha256") if is_same_run else "any",
        }

    old, new = relevant(saved), relevant(facts)
    changed = ", ".join(f"{name} was {old[name]!r}, now {new[name]!r}" for name in new if old.get(name) != new[name])
    if changed:
        raise InputError(f"{folder}: doesn't fit this run: {changed}; change the flags, or begin without it")


def build_model(config: ModelConfig, seed: int) -> MaskedLM:
    """A new model; its weights are a function of the seed and the configuration."""
    torch.manual_seed(int(keyed_rng(seed, "initial weights").integers(1 << 63)))
    return MaskedLM(config)


def with_rows_of(config: ModelConfig, older: dict) -> ModelConfig:
    """`config` with what no flag says of a model that it goes on from: rows without a word in its table, LayerNorm's epsilon.

    Args:
        older: the fields of that model's configuration.
    """
    rows = max(config.vocab_size, older["vocab_size"])
    return dataclasses.replace(config, vocab_size=rows, layer_norm_eps=older["layer_norm_eps"])


def start_from(folder: Path, model: MaskedLM, vocabulary: Vocabulary) -> dict:
    """Give `model` the weights of a model folder; returns their SHA-256, for the record.

    Raises:
        InputError: its vocabulary or shape is another one.
    """
    check_vocabulary(folder, vocabulary, "the samples' tokenizer")
    loaded = load_model(folder)
    old, new = (dataclasses.asdict(config) for config in (loaded.config, model.config))
    changed = [key for key in new if key not in FREE_TO_CHANGE and old[key] != new[key]]
    if changed:
        flags = " ".join(f"--{key} {old[key]}" for key in changed)
        raise InputError(f"--model_name_or_path: {folder} has another shape than the flags say; give {flags}")
    model.load_state_dict(loaded.state_dict())
    return describe_model(folder)


def pretrain(options: argparse.Namespace, gap_meter: GapMeter | None = None, now: Callable[[], float] = time.monotonic) -> Path:
    """Run the pre-training that the options describe, or the rest of it; returns the final model folder.

    Args:
        options: of `pretraining.training.arguments.build_parser`, checked.
        gap_meter: what measures the gap at validations, for `--rule-path`: `pretraining.evaluation.gap.GapMeter`.
        now: seconds of a monotonic clock.

    Raises:
        InputError: something that was given can't be used.
    """
    job = job_folder(options)
    ranks = start_ranks(options)
    found = agreed_state(options, job, ranks)
    check_accumulation(options, ranks.size)
    data, length = load_data(options, gap_meter)
    config, start = model_config(options, data.train.vocabulary.size, length), None
    if found is not None:
        config = with_rows_of(config, found.saved["model"])
    elif options.model_name_or_path:
        start = find_model(options.model_name_or_path)
        config = with_rows_of(config, dataclasses.asdict(read_config(start)))
    model = build_model(config, options.seed)
    if found is not None:
        data.facts["initial_weights"] = found.saved.get("initial_weights")
    elif start is not None:
        data.facts["initial_weights"] = start_from(start, model, data.train.vocabulary)
    model.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        model.compile_layers()
    arithmetic = precision(options, ranks.device)
    data.facts |= {"parameters": config.parameters, "world_size": ranks.size}
    data.facts |= {"precision": arithmetic, "zero_stage": zero_stage(options, arithmetic)}
    data.facts |= {"model": dataclasses.asdict(config)}
    progress = Progress()
    if found is not None:
        check_fits(found.saved, found.folder, data.facts)
        progress = state.progress_of(found.saved, found.folder)

    # Every rank has found that it can go on; from here on the main rank writes.
    ranks.wait()
    if ranks.is_main:
        announce(options, data.facts, found and found.folder, ranks)
        prepare(options, job, found)
    engine = build_engine(options, model, ranks.size, arithmetic)
    if found is not None:
        state.load(engine, found)
    return Trainer(options, engine, ranks, data, progress, now).run()


def announce(options: argparse.Namespace, facts: dict, folder: Path | None, ranks: Ranks) -> None:
    """Say what is about to happen, and which flags have no effect."""
    if options.layernorm_embedding:
        print("--layernorm_embedding: changes nothing, the embeddings always have a LayerNorm")
    if options.fp16 and facts["precision"] != "float16":
        print(f"warning: --fp16 needs CUDA; training in {facts['precision']} instead")
    print(
        f"{facts['parameters']:,} parameters, {ranks.size} rank(s) on {ranks.device.type}, "
        f"{facts['precision']}, batches of {options.train_batch_size} sentences"
    )
    print(f"going on from {folder}" if folder else f"new run in {job_folder(options)}", flush=True)
