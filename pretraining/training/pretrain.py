"""A pre-training run from the options of the command line: `pretrain`, and what it prepares before the training loop."""

import argparse
import contextlib
import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcfg.common.files import InputError, disk_errors, keyed_rng, versions
from pcfg.common.ranks import Ranks, use_threads
from pretraining.data.vocabulary import Vocabulary, resolve_tokenizer
from pretraining.model import checkpoints
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.model.layers import attention_kernels
from pretraining.training import state
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.arguments import check_accumulation, differences, job_folder, member_folders, model_config, seeds_of
from pretraining.training.branches import check_earlier_branches, cooled_models
from pretraining.training.engine import EngineLearner, precision, start_ranks, zero_stage
from pretraining.training.learner import Learner, Member
from pretraining.training.lock import lock
from pretraining.training.metrics import METRICS_FILE, diverged_error
from pretraining.training.sample_stream import Shards
from pretraining.training.stacked import StackedLearner, is_worth_stacking
from pretraining.training.state import Progress, RunFacts, Stacking, State
from pretraining.training.trainer import STATE_FOLDER, Data, Trainer

# Fields of a model's configuration that may change between a training state and the run that resumes from it.
FREE_TO_CHANGE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "attention")
# `pretraining.evaluation.loss.gap_meter`, which this package does not import.
GapMeter = Callable[[str, int, Vocabulary, int, int], Callable[[nn.Module], dict[str, float]]]


def pretrain(options: argparse.Namespace, gap_meter: GapMeter) -> Path:
    """Run the pre-training that the options describe, or the rest of it; returns the final model folder.

    The options are those of `pretraining.training.arguments`, checked. `Interrupted` after a signal, with the state saved.
    """
    ranks = start_ranks(options)
    if options.seeds is not None and ranks.size > 1:
        raise InputError(f"--seeds: trains on one rank, not on {ranks.size}; start it with plain python")
    with contextlib.ExitStack() as stack:
        start = agreed_state(options, ranks, stack)
        return build_trainer(options, gap_meter, ranks, start).run()


def build_trainer(options: argparse.Namespace, gap_meter: GapMeter, ranks: Ranks, start: State | None) -> Trainer:
    """The run of the options from a training state, or from its beginning, checked; the job's folder is made ready for it."""
    job = job_folder(options)
    check_accumulation(options, ranks.size)
    data, length = load_data(options, gap_meter)
    vocabulary = data.members[0].train.vocabulary

    config = model_config(options, vocabulary.size, length)
    initial_weights = None
    folders = []
    if start is not None:
        config = with_rows_of(config, start.saved.model)
        initial_weights = start.saved.initial_weights
    elif options.model_name_or_path:
        names = [options.model_name_or_path.replace("{seed}", str(seed)) for seed in seeds_of(options)]
        folders = [checkpoints.find_model(name) for name in names]
        config = with_rows_of(config, dataclasses.asdict(checkpoints.read_config(folders[0])))
        initial_weights = describe_initial(options, folders)
    use_threads(config.hidden_size * len(seeds_of(options)))
    models = [load_initial_model(folder, config, vocabulary) for folder in folders]
    models = models or [build_model(config, seed) for seed in seeds_of(options)]

    facts = run_facts(options, data, config, ranks, initial_weights)
    if start is not None:
        check_fits(start, facts)
    if start is not None and start.saved.stacked is not None:
        facts = facts.model_copy(update={"stacked": start.saved.stacked})  # decided once
    progress = Progress() if start is None else start.progress()
    check_earlier_branches(options, progress.step)
    # Every rank knows now that it can train; from here on the main rank writes.
    ranks.wait()
    if ranks.is_main:
        announce(options, facts, start, ranks)
        clean_up(options, job, start)
    learner = build_learner(options, models, ranks, facts)
    if start is not None:
        learner.load(start.folder, start.saved.files)
    return Trainer(options, learner, ranks, data, facts, progress, start.folder if start else None)


def describe_initial(options: argparse.Namespace, folders: list[Path]) -> dict[str, str]:
    """The facts of the models that the members start from, for the record of a run."""
    if options.seeds is None:
        return checkpoints.describe_model(folders[0])
    return {f"seed{seed}": checkpoints.weights_sha256(folder) for seed, folder in zip(options.seeds, folders, strict=True)}


def build_learner(options: argparse.Namespace, models: list[MaskedLM], ranks: Ranks, facts: RunFacts) -> Learner:
    """The learner of the options with one initial model per member; all ranks call this together."""
    if facts.stacked is not None:
        return StackedLearner(options, models, ranks.device, facts.stacked.vmap)
    (model,) = models
    model.activation_checkpointing = options.activation_checkpointing
    if options.compile:
        model.compile_layers()
    return EngineLearner(options, model, ranks, facts.precision)


def load_data(options: argparse.Namespace, gap_meter: GapMeter) -> tuple[Data, int]:
    """Tokenizer and shards, checked against each other, and the samples' `max_seq_length`."""
    tokenizer = resolve_tokenizer(options.tokenizer_name, nearby=[Path(options.dataset_path)])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    dynamic = seeds_of(options)[0] if options.dynamic_masking else None
    first = Shards(options.dataset_path, "train", vocabulary, dynamic=dynamic)
    length = first.max_seq_length
    test = None
    if options.do_validation:
        test = Shards(options.dataset_path, "test", vocabulary, first=options.validation_shards)
        length = max(length, test.max_seq_length)
    if options.max_position_embeddings is not None and options.max_position_embeddings < length:
        raise InputError(
            f"--max_position_embeddings: {options.max_position_embeddings}, but the samples in {options.dataset_path} have "
            f"{length} tokens (max_seq_length); give {length} or more"
        )

    def member(seed: int) -> Member:
        gap = adversarial = None
        if options.rule_path:
            gap = gap_meter(options.rule_path, options.gap_sentences, vocabulary, length, seed)
        if options.adversarial_weight:
            sizes = (options.adversarial_batch_size, options.adversarial_ridge)
            adversarial = AdversarialTerm(options.adversarial_file, *sizes, vocabulary, length, seed)
        return Member(seed, seed, first.of_stream(seed), adversarial, gap)

    return Data(tuple(map(member, seeds_of(options))), test, tokenizer), length


def build_model(config: ModelConfig, seed: int) -> MaskedLM:
    """A new model; its weights are a function of the seed and the configuration."""
    torch.manual_seed(int(keyed_rng(seed, "initial weights").integers(1 << 63)))
    return MaskedLM(config)


def load_initial_model(folder: Path, config: ModelConfig, vocabulary: Vocabulary) -> MaskedLM:
    """A model of `config` with the weights of a model folder, which must have its shape and vocabulary."""
    checkpoints.check_vocabulary(folder, vocabulary, "the samples' tokenizer")
    loaded = checkpoints.load_model(folder)
    old = dataclasses.asdict(loaded.config)
    new = dataclasses.asdict(config)
    flags = [f"--{key} {old[key]}" for key in new if key not in FREE_TO_CHANGE and old[key] != new[key]]
    if flags:
        raise InputError(f"--model_name_or_path: {folder} has another shape than the flags say; give {' '.join(flags)}")
    model = MaskedLM(config)
    model.load_state_dict(loaded.state_dict())
    return model


def with_rows_of(config: ModelConfig, older: dict[str, Any]) -> ModelConfig:
    """`config` with what no flag says of an `older` one to continue from: rows without a word, LayerNorm's epsilon."""
    rows = max(config.vocab_size, older["vocab_size"])
    return dataclasses.replace(config, vocab_size=rows, layer_norm_eps=older["layer_norm_eps"])


def run_facts(
    options: argparse.Namespace, data: Data, config: ModelConfig, ranks: Ranks, initial_weights: dict[str, str] | None = None
) -> RunFacts:
    """What `args.json` and `state.json` will say of the run."""
    arithmetic = precision(options, ranks.device)
    adversarial = data.members[0].adversarial
    optional: dict[str, Any] = {"initial_weights": initial_weights, "adversarial": adversarial.facts if adversarial else None}
    if options.seeds is not None:
        sentences = min(options.train_batch_size, options.train_micro_batch_size_per_gpu)
        vmap = is_worth_stacking(config, len(options.seeds), sentences * config.max_position_embeddings)
        optional["stacked"] = Stacking(seeds=seeds_of(options), vmap=vmap)
    return RunFacts(
        job_name=job_folder(options).name,
        seed=options.seed,
        vocabulary_sha256=data.members[0].train.vocabulary.sha256,
        git_revision=git_revision(),
        versions=versions("torch", "deepspeed", "transformers"),
        arguments=vars(options),
        model=dataclasses.asdict(config),
        parameters=config.parameters,
        world_size=ranks.size,
        threads=torch.get_num_threads(),
        precision=arithmetic,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
        attention=attention_kernels(config.attention, ranks.device, arithmetic),
        zero_stage=zero_stage(options, arithmetic),
        **{name: value for name, value in optional.items() if value is not None},
    )


def git_revision() -> str | None:
    """The project's commit, None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def announce(options: argparse.Namespace, facts: RunFacts, start: State | None, ranks: Ranks) -> None:
    """Print what is about to happen, and which flags have no effect."""
    if options.layernorm_embedding:
        print("--layernorm_embedding: changes nothing, the embeddings always have a LayerNorm")
    if options.fp16 and facts.precision != "float16":
        print(f"warning: --fp16 needs CUDA; training in {facts.precision} instead")
    elif facts.precision == "float32" and ranks.device.type == "cuda" and facts.stacked is None:
        print("note: float32, the slowest arithmetic of a GPU; --bf16 is several times as fast")
    if facts.stacked is not None:
        how = "stacked" if facts.stacked.vmap else "in turn, since stacking models of this size would gain less than 1.2"
        print(f"{len(facts.stacked.seeds)} seeds, {how}, without DeepSpeed's engine")
    print(
        f"{facts.parameters:,} parameters, {ranks.size} rank(s) on {ranks.device.type}, {facts.precision}, "
        f"batches of {options.train_batch_size} sentences"
    )
    print(f"new run in {job_folder(options)}" if start is None else f"going on from {start.folder}", flush=True)


def saved_folders(job: Path) -> list[Path]:
    """The model folders that a run has saved, also of its members."""
    patterns = (f"{name}step*/{checkpoints.FACTS_FILE}" for name in ("", "seed[0-9]*/"))
    return sorted(path.parent for pattern in patterns for path in job.glob(pattern))


def finished_model(options: argparse.Namespace) -> Path | None:
    """The final model folder, intact, of an earlier run with the same deciding arguments, the first of several; or None."""
    finals: dict[Path, Path] = {}  # by the folder of its member
    branches: set[int] = set()
    diverged: dict[str, str] = {}
    for folder in saved_folders(job_folder(options)):
        try:
            facts = checkpoints.read_facts(folder)
            if facts.get("final") and not differences(facts.get("arguments", {}), vars(options)):
                checkpoints.check_folder(folder)
                finals[folder.parent] = folder
                branches |= set(facts.get("branches", ()))
                diverged |= facts.get("diverged", {})
        except InputError as error:
            print(f"warning: {error}")
    seeds = zip(seeds_of(options), member_folders(options), strict=True)
    living = [folder for seed, folder in seeds if f"seed {seed}" not in diverged]
    if not all(folder in finals for folder in living):
        return None
    for step in sorted(branches):
        left_out = cooled_models(options, step)
        if left_out is None:
            return None
        diverged |= left_out
    if diverged:
        raise diverged_error(diverged)
    return finals[living[0]]


def agreed_state(options: argparse.Namespace, ranks: Ranks, stack: contextlib.ExitStack) -> State | None:
    """`starting_state`, determined by the main rank alone for all ranks; its InputError is raised on all ranks.

    The main rank holds the job's folder from here on, until `stack` is closed.
    """
    answer: State | InputError | None = None
    if ranks.is_main:
        try:
            stack.enter_context(lock(job_folder(options)))
            answer = starting_state(options, job_folder(options))
        except InputError as error:
            answer = error
    answer = ranks.of_main(answer)
    if isinstance(answer, InputError):
        raise answer
    return answer


def starting_state(options: argparse.Namespace, job: Path) -> State | None:
    """The training state to resume from: the run's own, else that of `--load_training_checkpoint`, else None."""
    arguments = vars(options)
    own = _own_state(options, job)
    if own is not None and not differences(own.saved.arguments, arguments):
        return own
    if options.load_training_checkpoint:
        root = Path(options.load_training_checkpoint)
        if options.overwrite and root.resolve().is_relative_to(job.resolve()):
            raise InputError(f"--overwrite: would delete the state that is to be loaded, {root}; leave one of them out")
        return state.find(root, options.load_checkpoint_id)
    if options.overwrite:
        return None
    earlier = {} if own is None else {own.folder: own.saved.arguments}
    for folder in saved_folders(job):
        earlier[folder] = checkpoints.read_facts(folder).get("arguments", {})
    for path, old in earlier.items():
        if changed := differences(old, arguments):
            raise InputError(
                f"{path}: from a run with other arguments ({changed}); give another --job_name, --overwrite to delete what "
                f"is in {job}, or --load_training_checkpoint {job / STATE_FOLDER} to go on from there with the new ones"
            )
    return None


def _own_state(options: argparse.Namespace, job: Path) -> State | None:
    """The newest intact state that earlier runs left in the folder `job`, unless `--resume never`."""
    if options.resume == "never":
        leftovers = [*saved_folders(job), *job.glob(STATE_FOLDER)]
        if leftovers and not options.overwrite:
            raise InputError(
                f"--resume never: {leftovers[0]} is there; add --overwrite to delete what a run left, or another --job_name"
            )
        return None
    try:
        return state.newest(job / STATE_FOLDER)
    except InputError as error:
        if not options.overwrite and not options.load_training_checkpoint:
            raise
        print(f"warning: {error}")
        return None


def check_fits(start: State, facts: RunFacts) -> None:
    """Refuse a training state of another model, vocabulary, optimizer or, if it is split over them, number of ranks.

    With the same arguments, a labelled file that has changed since is refused too.
    """
    is_same_run = not differences(start.saved.arguments, facts.arguments)

    def relevant(run: RunFacts) -> dict[str, Any]:
        shape = {name: value for name, value in run.model.items() if name not in FREE_TO_CHANGE}
        return shape | {
            "vocabulary": run.vocabulary_sha256,
            "optimizer_type": run.arguments["optimizer_type"],
            "zero_stage": run.zero_stage,
            "float16": run.precision == "float16",
            "ranks": run.world_size if run.zero_stage else "any",
            "seeds": list(run.stacked.seeds) if run.stacked else None,
            "the SHA-256 of --adversarial_file": (run.adversarial or {}).get("sha256") if is_same_run else "any",
        }

    old = relevant(start.saved)
    new = relevant(facts)
    changed = ", ".join(f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name])
    if changed:
        raise InputError(f"{start.folder}: doesn't fit this run: {changed}; change the flags, or begin without it")


def clean_up(options: argparse.Namespace, job: Path, start: State | None) -> None:
    """Make the run's folder ready: remove what `--overwrite` deletes, damaged states and leftovers of kills."""
    if options.overwrite and start is None:
        for path in [*job.glob("step*"), *job.glob("seed[0-9]*"), job / STATE_FOLDER]:
            if path.is_dir():
                shutil.rmtree(path)
        (job / METRICS_FILE).unlink(missing_ok=True)
    if start is not None and start.folder.parent == job / STATE_FOLDER and not options.load_checkpoint_id:
        state.tidy(start, options.keep_checkpoints)
    for leftover in (*job.glob(".step*.tmp"), *job.glob("seed[0-9]*/.step*.tmp")):  # unfinished model folders
        shutil.rmtree(leftover)
    with disk_errors(job):
        job.mkdir(parents=True, exist_ok=True)
