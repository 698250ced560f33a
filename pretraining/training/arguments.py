"""The command line of `run_pretraining.py`: its flags, valid combinations, `--config`, and which flags decide a result.

The flags are those of academic-budget-bert (Izsak et al. 2021) that have a meaning here.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcfg.common.cli import (
    Parser,
    ascending,
    boolean,
    finite,
    non_negative,
    non_negative_int,
    number,
    positive,
    positive_int,
    probability,
)
from pcfg.common.files import FILES, InputError, read_json, read_sealed
from pretraining.model.config import ACTIVATIONS, ATTENTIONS, LAYER_NORM_MODES, LAYER_NORMS, ModelConfig

OPTIMIZERS = ("adam", "adamw", "lamb", "adafactor", "sgd")
# Arguments that change neither the weights nor what is saved: a run may be resumed with others.
WITHOUT_EFFECT = frozenset(
    {
        *("deepspeed", "local_rank", "data_loader_type", "layernorm_embedding", "wall_clock_breakdown"),
        *("print_steps", "log_throughput_every", "steps_per_print", "report_to", "project_name"),
        *("output_dir", "job_name", "current_run_id", "overwrite", "keep_checkpoints", "validation_micro_batch"),
        *("config", "resume", "activation_checkpointing", "save_state_minutes"),
    }
)
# They describe a term that exists only if its weight is not 0.
ADVERSARIAL = frozenset(f"adversarial_{name}" for name in ("weight", "file", "batch_size", "ridge"))
COOLDOWN = frozenset({"branch_steps", "cooldown_steps", "cooldown_batch_size"})  # without effect unless the schedule is wsd
# The measurements of the gap, which change nothing unless a run stops at a gap.
TARGET = frozenset({"target_gap", "gap_steps", "gap_sentences", "rule_path"})
# Not with --seeds.
ENGINE_ONLY = (
    *("fp16", "bf16", "zero_stage", "activation_checkpointing", "compile"),
    *("prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown", "steps_per_print"),
)
# These belong to one start of a run, not to the run: `--config` does not take them over.
OF_ONE_START = frozenset({"config", "resume", "overwrite", "local_rank"})


decay = number("decay", float, lambda value: 0.0 <= value < 1.0, "in [0, 1)")  # weight of the past in a running mean


class _Group:
    """A titled group of flags of a parser."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, description: str | None = None):
        self._group = parser.add_argument_group(title, description)

    def value(self, name: str, kind: Callable | tuple, default: object, text: str) -> None:
        """A flag with a value of type `kind`, or one of the choices `kind`; the help states the default."""
        options: dict[str, Any] = {"choices": kind, "type": type(kind[0])} if isinstance(kind, tuple) else {"type": kind}
        shown = text if "(default" in text else f"{text} (default: {default})"
        self._group.add_argument(f"--{name}", default=default, help=shown, **options)

    def required(self, name: str, text: str) -> None:
        self._group.add_argument(f"--{name}", required=True, help=text)

    def switch(self, name: str, text: str) -> None:
        """A flag alone, or followed by true or false."""
        shown = f"{text} (default: false)"
        self._group.add_argument(f"--{name}", nargs="?", type=boolean, const=True, default=False, help=shown)


def _add_data_and_model(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "data")
    group.required("dataset_path", "folder of train_shard_*.hdf5 from generate_samples.py")
    group.required("tokenizer_name", "tokenizer of the samples: the name given to generate_samples.py, a folder, or a hub name")
    group.value("data_loader_type", ("dist", "per_device"), "dist", "accepted; both mean the same: ranks share every file")
    text = "draw new masks each time a training shard is read, by the rule stored in its file: a function of (--seed, sample, "
    group.switch("dynamic_masking", text + "epoch); generate_samples.py then needs no --dup_factor")

    group = _Group(parser, "model")
    group.value("model_type", ("bert-mlm",), "bert-mlm", "kind of model")
    text = "initial weights of this shape: folder or hub name, in which {seed} becomes the seed (default: new, by --seed)"
    group.value("model_name_or_path", str, None, text)
    group.value("hidden_size", positive_int, 1024, "width")
    group.value("num_hidden_layers", positive_int, 24, "layers")
    group.value("num_attention_heads", positive_int, 16, "attention heads")
    group.value("intermediate_size", positive_int, 4096, "width of the feed-forward layers")
    group.value("hidden_act", ACTIVATIONS, "gelu", "activation of the feed-forward layers")
    group.value("hidden_dropout_prob", probability, 0.1, "dropout of embeddings and sub-layers")
    group.value("attention_probs_dropout_prob", probability, 0.1, "dropout of attention")
    group.value("max_position_embeddings", positive_int, None, "with [CLS] and [SEP] (default: the samples' max_seq_length)")
    group.value("type_vocab_size", positive_int, 2, "rows of the segment table")
    group.value("initializer_range", non_negative, 0.02, "standard deviation of new weights")
    group.value("encoder_ln_mode", LAYER_NORM_MODES, "pre-ln", "LayerNorm before each sub-layer, or after")
    group.value("layer_norm_type", LAYER_NORMS, "pytorch", "kind of LayerNorm")
    group.value("attention", ATTENTIONS, "sdpa", "attention backend; apex: NVIDIA's, of commit 3c98f93d or before")
    group.switch("layernorm_embedding", "accepted, changes nothing: the embeddings always have a LayerNorm")


def _add_optimizer_and_batches(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "optimizer")
    group.value("optimizer_type", OPTIMIZERS, "adamw", "algorithm")
    group.value("lr", non_negative, 1e-3, "highest learning rate")
    group.value("weight_decay", non_negative, 0.01, "of matrices only")
    group.value("adam_beta1", decay, 0.9, "adam, adamw, lamb")
    group.value("adam_beta2", decay, 0.999, "adam, adamw, lamb")
    group.value("adam_eps", non_negative, 1e-6, "adam, adamw, lamb")
    group.value("sgd_momentum", decay, 0.9, "sgd")
    group.value("gradient_clipping", non_negative, 1.0, "highest gradient norm; 0: no clipping")
    text = (
        "rho of sharpness-aware minimisation (Foret et al. 2021): the gradient is that at w + rho g / ||g||, with the gradient "
    )
    text += "g at w of all that a step minimises, adversarial term included. Twice the cost per step; 0: off"
    group.value("sam_rho", non_negative, 0.0, text)

    group = _Group(parser, "batches")
    group.value("train_batch_size", positive_int, 4096, "sentences per step, over all ranks")
    group.value("train_micro_batch_size_per_gpu", positive_int, 32, "maximum sentences per forward pass")
    text = "accepted; if given, train_batch_size must be train_micro_batch_size_per_gpu x ranks x this (default: not given)"
    group.value("gradient_accumulation_steps", positive_int, None, text)

    # The parser leaves descriptions as they are.
    description = """Features that are bad for a downstream task (Liu et al. 2023, App. A.4). A step minimises
    masked-LM loss - L x mean over validation sentences of || phi W - y ||^2
    where W minimises || Phi W - Y ||^2 + r || W ||^2 over the sentences that it is fitted on
phi: last hidden states of all positions of the unmasked sentence, concatenated, of norm 1;
y: one-hot label minus 1 / classes. The gradient goes through the features of both parts."""
    group = _Group(parser, "adversarial term", description)
    group.value("adversarial_weight", non_negative, None, "L; 0: no term, and nothing else changes (default: no term)")
    group.value("adversarial_file", str, None, "CSV file text,label of generate_downstream.py, for L above 0 (default: none)")
    text = "labelled sentences per step, distinct and drawn anew from (--seed, step): half to fit W, half to measure it; each "
    group.value("adversarial_batch_size", positive_int, 256, text + "rank computes the term of all of them")
    group.value("adversarial_ridge", non_negative, 1e-3, "r, above 0; the smaller, the further the term can grow")


def _add_schedule_duration_and_precision(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "learning-rate schedule")
    text = "unit of the schedule. step: steps of --max_steps, warmup by --warmup_proportion; constant_step: the same with a "
    text += "warmup of --num_warmup_steps; time: hours of --total_training_time; wsd: warmup of --num_warmup_steps, then --lr "
    text += "to --max_steps, and cooldown branches to 0"
    group.value("lr_schedule", ("step", "constant_step", "time", "wsd"), "time", text)
    text = "after the warmup. linear: to 0 at the end; exp: decay_rate^((steps or hours since then) / decay_step); const: --lr"
    group.value("curve", ("linear", "exp", "const"), "linear", text)
    group.value("warmup_proportion", probability, 0.06, "of the steps or hours, for step and time")
    group.value("num_warmup_steps", non_negative_int, 1000, "steps, for constant_step and wsd")
    group.value("decay_rate", probability, 0.99, "of --curve exp")
    group.value("decay_step", positive_int, 1000, "of --curve exp, in steps or hours")

    # The parser leaves descriptions as they are.
    description = """A branch is a copy of the trunk's weights and optimizer at a step, on an order of samples, dynamic
masks and dropout of its own, with a rate that falls linearly to 0. The trunk goes on as if there
were no branches. Its models are step0008000, cooled ones step0008000-cooled: measurements take these."""
    group = _Group(parser, "cooldown branches, for --lr_schedule wsd", description)
    text = "comma-separated steps of the trunk at which a model folder is saved and a branch begins (default: none)"
    group.value("branch_steps", ascending(positive_int), [], text)
    group.value("cooldown_steps", positive_int, None, "steps of each branch (default: no branches)")
    group.value("cooldown_batch_size", positive_int, None, "sentences per step of a branch (default: --train_batch_size)")

    group = _Group(parser, "duration (the first limit reached ends the run)")
    group.value("max_steps", positive_int, None, "steps (default: no limit)")
    group.value("num_epochs", positive_int, 1_000_000, "epochs; one epoch is one shard")
    group.value("max_steps_per_epoch", positive_int, None, "steps per shard (default: all)")
    group.value("total_training_time", non_negative, 24.0, "hours")
    group.value("early_exit_time_marker", non_negative, 24.0, "hours, without effect on the learning rate")
    text = "nats: stop at the first of --gap_steps where each model's gap (mean over sentences) plus 1.96 standard errors is "
    group.value("target_gap", positive, None, text + "below; with wsd a branch follows (default: never)")
    group.switch("use_early_stopping", "stop if the validation loss is still high after --early_stop_time")
    group.value("early_stop_time", non_negative, 720.0, "minutes")
    group.value("early_stop_eval_loss", finite, 2.1, "nats")
    group.value("scale_cnt_limit", positive_int, 100, "with --fp16: stop after this many steps at the lowest loss scale")

    group = _Group(parser, "precision and DeepSpeed")
    group.switch("fp16", "float16 with a dynamic loss scale; on a CPU, with a warning, bf16 if the CPU has it, else float32")
    group.switch("bf16", "bfloat16 arithmetic on float32 weights")
    group.switch("deepspeed", "accepted; the engine is always DeepSpeed's")
    group.value("zero_stage", (0, 1, 2), 0, "split over ranks: 1: optimizer state, 2: also gradients; 0: nothing")
    group.switch("activation_checkpointing", "keep only the inputs of layers and recompute the rest: less memory, slower")
    group.switch("compile", "torch.compile for the layers (needs a C++ compiler; minutes at the start)")
    group.switch("prescale_gradients", "divide gradients by the number of ranks before their sum")
    group.value("gradient_predivide_factor", non_negative, None, "divides gradients before their sum (default: DeepSpeed's)")
    group.switch("wall_clock_breakdown", "DeepSpeed's own timings")
    group.value("steps_per_print", positive_int, None, "steps between DeepSpeed's own lines (default: none)")
    group.value("local_rank", int, -1, "set by the launcher")
    group.value("seed", non_negative_int, 42, "of weights, order and dropout")
    text = "comma-separated: one model per seed, trained at the same time, in float32 on one rank and without DeepSpeed's "
    text += "engine; in OUTPUT_DIR/JOB_NAME/seedS. Without dropout each equals the run of its --seed up to rounding, with "
    group.value("seeds", ascending(non_negative_int), None, text + "dropout it is another one (default: one model, by --seed)")


def _add_validation_and_output(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "validation")
    group.switch("do_validation", "loss on test_shard_*.hdf5, at ends of epochs and at the end")
    group.value("validation_epochs", positive_int, 10, "epochs between two validations")
    group.value("validation_epochs_begin", positive_int, 1, "the same in the first part")
    group.value("validation_epochs_end", positive_int, 1, "the same in the last part")
    group.value("validation_begin_proportion", probability, 0.1, "first part, as a proportion of training")
    group.value("validation_end_proportion", probability, 0.1, "last part, as a proportion of training")
    group.value("validation_micro_batch", positive_int, 16, "sentences per forward pass; on CUDA at least 65,536 tokens")
    group.value("rule-path", str, None, "the samples' grammar: validations also measure the gap to the entropy (default: none)")
    text = "steps between two measurements of the gap, which saved models then have as well (default: at validations only)"
    group.value("gap_steps", positive_int, None, text)
    group.value("gap_sentences", positive_int, 300, "sentences on which the gap is measured")
    group.value("validation_shards", positive_int, 1, "number of test shards used, always the first")

    group = _Group(parser, "output and resuming")
    group.required("output_dir", "everything is written to OUTPUT_DIR/JOB_NAME")
    group.value("job_name", str, None, "name of the run's folder (default: run- and a hash of the flags that decide the run)")
    group.value("current_run_id", str, "", "appended to the job's name (default: nothing)")
    text = "comma-separated steps at which a model folder is saved; 0: before the first step (default: only the end)"
    group.value("save_steps", ascending(non_negative_int), [], text)
    group.value("num_epochs_between_checkpoints", int, -1, "epochs between two model folders; -1: none")
    text = "comma-separated proportions of --total_training_time at which a model folder is saved (default: none)"
    group.value("finetune_time_markers", ascending(probability), [], text)
    group.value("print_steps", positive_int, 100, "steps between two records")
    group.value("log_throughput_every", positive_int, None, "steps between two lines with the speed (default: none)")
    group.value("project_name", str, None, "also record in Weights & Biases, under this project (default: no)")
    group.value("report_to", ("wandb", "none"), "wandb", "none: metrics.jsonl only")
    text = "args.json of a model folder: flags not given are as in that run, also --output_dir and --job_name (default: none)"
    group.value("config", str, None, text)
    text = "auto: resume an interrupted run from its newest intact training state; never: start anew, with --overwrite if the "
    group.value("resume", ("auto", "never"), "auto", text + "folder holds a run")
    text = "a training_state folder to start from; a state of the interrupted run itself comes first (default: none)"
    group.value("load_training_checkpoint", str, None, text)
    group.value("load_checkpoint_id", str, None, "which state of that folder (default: the latest)")
    text = "minutes between two training states, which validations and saved models also make: what a kill may cost"
    group.value("save_state_minutes", positive, 30.0, text)
    group.value("keep_checkpoints", positive_int, 2, "number of training states on disk")
    group.switch("overwrite", "delete the model folders, training states and metrics of an earlier run in OUTPUT_DIR/JOB_NAME")


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of run_pretraining.py, its flags grouped by purpose."""
    parser = Parser(description=description)
    _add_data_and_model(parser)
    _add_optimizer_and_batches(parser)
    _add_schedule_duration_and_precision(parser)
    _add_validation_and_output(parser)
    return parser


def parse_with_config(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line (None: that of this process); flags that it lacks are taken from the file of its `--config`."""
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    if path is not None:
        _set_defaults(parser, path)
    return parser.parse_args(arguments)


def _set_defaults(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the arguments in the file `path` the defaults of `parser`."""
    content = read_json(path)
    if Path(path).name in content.get(FILES, ()):  # not an edited copy
        content = read_sealed(Path(path))
    saved = content.get("arguments")
    if not isinstance(saved, dict):
        raise InputError(f"--config: {path}: has no 'arguments'; give the args.json of a model folder")
    # argparse has no public list of a parser's flags.
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, value in saved.items():
        if name not in actions:
            raise InputError(f"--config: {path}: {name!r} is no flag of run_pretraining.py; remove it")
        if name in OF_ONE_START:
            continue
        if not _is_possible(actions[name], value):
            raise InputError(f"--config: {path}: {name!r} can't be {value!r}; correct it, or give --{name}")
        actions[name].default = value
        actions[name].required = False


def _is_possible(action: argparse.Action, value: Any) -> bool:
    """Whether a value from JSON is one of the flag of `action`: parsing its text gives it back."""
    if value is None:
        return action.default is None and not action.required
    if action.nargs == "?":
        return isinstance(value, bool)
    kind = action.type if callable(action.type) else str
    try:
        parsed = kind(",".join(map(str, value)) if isinstance(value, list) else str(value))
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)


def check(options: argparse.Namespace) -> None:
    """Refuse combinations of flags that cannot be run, before anything is started or read."""
    if not Path(options.dataset_path).is_dir():
        raise InputError(f"--dataset_path: {options.dataset_path}: no such folder; make one with generate_samples.py")
    if options.fp16 and options.bf16:
        raise InputError("--fp16 and --bf16 are both given; choose one")
    if options.sam_rho and (options.fp16 or options.zero_stage):
        other = "--fp16" if options.fp16 else f"--zero_stage {options.zero_stage}"
        raise InputError(f"--sam_rho: needs whole gradients in float32, which {other} has not; leave one of the two out")
    if options.lr_schedule != "time" and options.max_steps is None:
        raise InputError(f"--lr_schedule {options.lr_schedule}: needs --max_steps, the step where the schedule ends; add it")
    if options.lr_schedule == "time" and not options.total_training_time:
        raise InputError("--total_training_time: 0 hours; the schedule needs more")
    if options.gradient_predivide_factor == 0:
        raise InputError("--gradient_predivide_factor: gradients can't be divided by 0; give another value")
    if options.rule_path and not (options.do_validation or options.gap_steps):
        raise InputError("--rule-path: the gap is measured at validations; add --do_validation or --gap_steps")
    _check_cooldown(options)
    if options.load_checkpoint_id and not options.load_training_checkpoint:
        raise InputError("--load_checkpoint_id: give the folder of this state with --load_training_checkpoint")
    if options.adversarial_weight and options.adversarial_file is None:
        raise InputError(f"--adversarial_weight: {options.adversarial_weight:g}, but of which task? add --adversarial_file")
    if options.adversarial_weight is None and options.adversarial_file is not None:
        raise InputError(f"--adversarial_file: {options.adversarial_file}: say with --adversarial_weight how much it counts")
    if options.adversarial_batch_size % 2:
        raise InputError(f"--adversarial_batch_size: {options.adversarial_batch_size} has no halves; give an even number")
    if options.adversarial_ridge == 0:
        raise InputError("--adversarial_ridge: 0 leaves the head undetermined; give a number above 0")
    # Measurements pass over hidden folders, and ".." would put the run next to --output_dir.
    name = "run" if options.job_name is None else options.job_name
    if not name or name.startswith(".") or "/" in name + options.current_run_id:
        name = "-".join(filter(None, (name, options.current_run_id)))
        raise InputError(f"--job_name, --current_run_id: {name!r} is no folder's name here; leave out '/' and a '.' in front")
    model_config(options, vocab_size=1, max_seq_length=1)
    if options.seeds is not None:
        _check_stacked(options)


def _check_stacked(options: argparse.Namespace) -> None:
    """Refuse what members that share their operations can't do, or only DeepSpeed's engine can."""
    if not options.seeds:
        raise InputError("--seeds: no seed is given; give one or more, separated by commas")
    for name in ENGINE_ONLY:
        if getattr(options, name):
            raise InputError(f"--{name}: not with --seeds, which trains without DeepSpeed's engine; leave one of them out")
    for name in ("attention", "layer_norm_type"):
        if getattr(options, name) == "apex":
            raise InputError(f"--{name} apex: its kernels know no stacked members; leave it out, or --seeds")
    if options.project_name and options.report_to == "wandb":
        raise InputError("--project_name: Weights & Biases gets one curve per run; with --seeds leave it out")


def _check_cooldown(options: argparse.Namespace) -> None:
    """Refuse flags of branches and of the gap that do not go together."""
    if options.gap_steps and not options.rule_path:
        raise InputError(f"--gap_steps {options.gap_steps}: the gap needs the samples' grammar; add --rule-path")
    if options.target_gap and not options.gap_steps:
        raise InputError(f"--target_gap {options.target_gap:g}: when is the gap measured? add --gap_steps (and --rule-path)")
    if options.lr_schedule != "wsd":
        for name in sorted(COOLDOWN):
            if getattr(options, name):
                raise InputError(f"--{name}: --lr_schedule {options.lr_schedule} has no branches; give --lr_schedule wsd")
        return
    if options.curve != "linear":
        raise InputError(f"--curve {options.curve}: with --lr_schedule wsd the rate is constant; leave it out")
    branches = options.branch_steps or options.target_gap
    if branches and not options.cooldown_steps:
        flag = "--branch_steps" if options.branch_steps else "--target_gap"
        raise InputError(f"{flag}: of how many steps are the branches? add --cooldown_steps")
    if not branches and (options.cooldown_steps or options.cooldown_batch_size):
        flag = "--cooldown_steps" if options.cooldown_steps else "--cooldown_batch_size"
        raise InputError(f"{flag}: there are no branches; add --branch_steps or --target_gap")
    if options.branch_steps and options.branch_steps[-1] > options.max_steps:
        raise InputError(f"--branch_steps: {options.branch_steps[-1]} is after --max_steps {options.max_steps}; leave it out")


def check_accumulation(options: argparse.Namespace, world_size: int) -> None:
    """Refuse a `--gradient_accumulation_steps` that contradicts the batch sizes."""
    batch = options.train_batch_size
    micro = options.train_micro_batch_size_per_gpu
    number = options.gradient_accumulation_steps
    if number is not None and batch != micro * world_size * number:
        raise InputError(
            f"--gradient_accumulation_steps: {number}, but --train_batch_size {batch} is not "
            f"--train_micro_batch_size_per_gpu {micro} x {world_size} rank(s) x {number}; leave it out, the number of "
            "micro-batches follows from the sentences' lengths"
        )


def model_config(options: argparse.Namespace, vocab_size: int, max_seq_length: int) -> ModelConfig:
    """The model that the options describe."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelConfig) if field.name in options}
    positions = options.max_position_embeddings or max_seq_length
    return ModelConfig(**{**values, "vocab_size": vocab_size, "max_position_embeddings": positions})


def job_folder(options: argparse.Namespace) -> Path:
    """The folder of everything that the run writes: OUTPUT_DIR/JOB_NAME[-RUN_ID]."""
    name = options.job_name
    if name is None:
        decides = json.dumps(deciding(vars(options)), sort_keys=True)
        name = f"run-{hashlib.sha256(decides.encode()).hexdigest()[:8]}"
    return Path(options.output_dir) / "-".join(filter(None, (name, options.current_run_id)))


def seeds_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The seeds of the members of a run."""
    return (options.seed,) if options.seeds is None else tuple(options.seeds)


def member_folders(options: argparse.Namespace) -> list[Path]:
    """The folder of each member's models: `seedS` in that of the run with --seeds, else that of the run."""
    job = job_folder(options)
    return [job] if options.seeds is None else [job / f"seed{seed}" for seed in options.seeds]


def deciding(arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's arguments that decides its weights and what it saves."""
    without = WITHOUT_EFFECT
    if not arguments.get("adversarial_weight"):
        without |= ADVERSARIAL
    if not arguments.get("sam_rho"):
        without |= {"sam_rho"}  # older runs have no such flag
    if arguments.get("lr_schedule") != "wsd":
        without |= COOLDOWN
    if not arguments.get("target_gap"):
        without |= TARGET
    return {name: value for name, value in arguments.items() if name not in without}


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The differences between two runs' deciding arguments, in words; empty if there are none.

    >>> differences({"lr": 0.1, "local_rank": 0}, {"lr": 0.2, "local_rank": 1})
    'lr was 0.1, now 0.2'
    """
    old = deciding(old)
    new = deciding(new)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in changed)
