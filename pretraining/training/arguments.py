"""The command line of `run_pretraining.py`: what its flags may be together, and which of them decide what a run gives."""

import argparse
from pathlib import Path

from pcfg.common.cli import Parser
from pcfg.common.files import InputError
from pretraining.model.config import ModelConfig
from pretraining.training.flags import add_flags

# Arguments that change neither the weights nor what is saved: a run may be taken up again with others.
WITHOUT_EFFECT = frozenset(
    {
        *("deepspeed", "local_rank", "data_loader_type", "layernorm_embedding", "wall_clock_breakdown"),
        *("print_steps", "log_throughput_every", "steps_per_print", "report_to", "project_name"),
        *("output_dir", "job_name", "current_run_id", "overwrite", "keep_checkpoints", "validation_micro_batch"),
        *("config", "resume", "activation_checkpointing", "rule_path", "gap_sentences"),
    }
)
# They describe a term that is there only where its weight is not 0.
ADVERSARIAL = frozenset(f"adversarial_{name}" for name in ("weight", "file", "batch_size", "ridge"))


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of run_pretraining.py, its flags grouped by purpose."""
    parser = Parser(description=description)
    add_flags(parser)
    return parser


def check(options: argparse.Namespace) -> None:
    """Find what can't be run before anything is started or read.

    Raises:
        InputError: names the flag, its value and what to do.
    """
    if not Path(options.dataset_path).is_dir():
        raise InputError(f"--dataset_path: {options.dataset_path}: no such folder; make one with generate_samples.py")
    if options.fp16 and options.bf16:
        raise InputError("--fp16 and --bf16 are both given; choose one")
    if options.lr_schedule != "time" and options.max_steps is None:
        raise InputError(f"--lr_schedule {options.lr_schedule}: needs --max_steps, the step where the schedule ends; add it")
    if options.lr_schedule == "time" and not options.total_training_time:
        raise InputError("--total_training_time: 0 hours; the schedule needs more")
    if options.gradient_predivide_factor == 0:
        raise InputError("--gradient_predivide_factor: gradients can't be divided by 0; give another value")
    if options.rule_path and not options.do_validation:
        raise InputError("--rule-path: the gap is measured at validations; add --do_validation")
    if options.load_checkpoint_id and not options.load_training_checkpoint:
        raise InputError("--load_checkpoint_id: say with --load_training_checkpoint which folder it is in")
    _check_adversarial(options)
    # A hidden folder would be passed over by the measurements, and ".." would put the run beside --output_dir.
    if not options.job_name or options.job_name.startswith(".") or "/" in options.job_name + options.current_run_id:
        raise InputError(
            f"--job_name, --current_run_id: {job_folder(options).name!r} is no name of a folder here; leave out '/' and a "
            "'.' at the beginning"
        )
    model_config(options, vocab_size=1, max_seq_length=1)


def _check_adversarial(options: argparse.Namespace) -> None:
    """The part of `check` that is about the adversarial term."""
    weight, file, size = options.adversarial_weight, options.adversarial_file, options.adversarial_batch_size
    if weight and file is None:
        raise InputError(f"--adversarial_weight: {weight:g}, but of which task? add --adversarial_file")
    if weight is None and file is not None:
        raise InputError(f"--adversarial_file: {file}: say with --adversarial_weight how much it counts")
    if size % 2:
        raise InputError(f"--adversarial_batch_size: {size} has no halves; give an even number")
    if options.adversarial_ridge == 0:
        raise InputError("--adversarial_ridge: 0 leaves the head undetermined; give a number above 0")


def model_config(options: argparse.Namespace, vocab_size: int, max_seq_length: int) -> ModelConfig:
    """The model that the options describe.

    Raises:
        InputError: no such model can be built.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        max_position_embeddings=options.max_position_embeddings or max_seq_length,
        **{
            name: getattr(options, name)
            for name in (
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
                *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range"),
                *("layer_norm_type", "encoder_ln_mode", "attention"),
            )
        },
    )


def check_accumulation(options: argparse.Namespace, world_size: int) -> None:
    """Refuse a `--gradient_accumulation_steps` that doesn't agree with the batch sizes.

    Raises:
        InputError: train_batch_size is not train_micro_batch_size_per_gpu x ranks x gradient_accumulation_steps.
    """
    batch, micro, steps = options.train_batch_size, options.train_micro_batch_size_per_gpu, options.gradient_accumulation_steps
    if steps is not None and batch != micro * world_size * steps:
        raise InputError(
            f"--gradient_accumulation_steps: {steps}, but --train_batch_size {batch} is not "
            f"--train_micro_batch_size_per_gpu {micro} x {world_size} rank(s) x {steps}; leave it out, the number of "
            "micro-batches follows from the sentences' lengths"
        )


def job_folder(options: argparse.Namespace) -> Path:
    """The folder of everything that the run writes: OUTPUT_DIR/JOB_NAME[-RUN_ID]."""
    return Path(options.output_dir) / "-".join(filter(None, (options.job_name, options.current_run_id)))


def deciding(arguments: dict) -> dict:
    """The part of a run's arguments that decides its weights and what it saves."""
    without = WITHOUT_EFFECT if arguments.get("adversarial_weight") else WITHOUT_EFFECT | ADVERSARIAL
    return {name: value for name, value in arguments.items() if name not in without}


def differences(old: dict, new: dict) -> str:
    """What distinguishes two runs' deciding arguments, in words; empty if nothing does.

    >>> differences({"lr": 0.1, "local_rank": 0}, {"lr": 0.2, "local_rank": 1})
    'lr was 0.1, now 0.2'
    """
    old, new = deciding(old), deciding(new)
    return ", ".join(
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )
