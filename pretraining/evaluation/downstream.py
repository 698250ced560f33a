"""Common parts of the downstream measurements (linear probe, fine-tuning): command-line flags, the record of accuracies."""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import special
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pcfg.common.cli import RECORDS_HELP, Parser
from pcfg.common.files import InputError
from pcfg.common.means import wilson
from pretraining.data.tasks import GLUE, Task
from pretraining.evaluation.records import AccuracyRecord, CurveRecord, FinetuneRecord, ProbeRecord, is_measured, write_record

SEEDS = 1 << 32  # number of seeds of numpy, which the Trainer sets
flag: Any = HfArg  # a dataclass field that `HfArgumentParser` turns into a flag, with the type of its annotation


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description with its line breaks, and the default of each flag."""


@dataclasses.dataclass(kw_only=True)
class DownstreamArguments:
    """Model, data and seeds of a downstream measurement."""

    _argument_group_name = "model and data"

    model_name_or_path: str | None = flag(
        default=None, help="model folder, folder with model folders at any depth (measured one by one), or a name on the hub"
    )
    tokenizer_name: str | None = flag(
        default=None, help="tokenizer, looked up in the model folder first; its vocabulary must be that of the model"
    )
    task_name: str | None = flag(default=None, help=f"a GLUE task ({', '.join(GLUE)}), from the hub or files with its columns")
    train_file: str | None = flag(default=None, help="file to train on: CSV text,label; with --task_name: the columns of GLUE")
    validation_file: str | None = flag(default=None, help="file to measure the accuracy on, in the same format")
    max_train_samples: int | None = flag(default=None, help="train on the first sentences of --train_file only; default: all")
    max_seq_length: int = flag(
        default=32,
        help="positions of the concatenated features, in tokens with [CLS] and [SEP]; a longer sentence is an error, except in "
        "natural text, where it is cut",
    )
    tokenization: Literal["auto", "words", "pieces"] = flag(
        default="auto",
        help="words: one token per word, an unknown word is an error; pieces: natural text, the tokenizer splits words, and "
        "unknown or cut tokens are counted; auto: pieces with --task_name",
    )
    seeds: str | None = flag(
        default=None,
        help="seeds of initialisation and order, separated by commas: one run each, and a standard error over them; "
        "default: the seed of --seed",
    )
    records_path: str | None = flag(default=None, help=RECORDS_HELP)
    overwrite: bool = flag(default=False, help="measure again, even with a complete record")


@dataclasses.dataclass
class DownstreamTrainingArguments(TrainingArguments):
    """`TrainingArguments` of transformers, with the old name of --eval_strategy and the defaults of a measurement."""

    _argument_group_name = "training (Hugging Face TrainingArguments)"

    eval_strategy: IntervalStrategy | str = flag(
        default="no",
        aliases=["--evaluation_strategy"],
        help="evaluations during training, for the best accuracy: no, steps (every --eval_steps) or epoch",
    )
    save_strategy: SaveStrategy | str = flag(default="no", help="only no: a measurement keeps no checkpoints")
    output_dir: str | None = flag(
        default=None, help="folder for records of a lookup table or of words (run_lp); a model's go into its own"
    )
    do_train: bool = flag(default=True, help="accepted for compatibility: a measurement always trains")
    do_eval: bool = flag(default=True, help="accepted for compatibility: a measurement always evaluates")
    seed: int = flag(default=0, help="seed without --seeds")
    report_to: None | str | list[str] = flag(default="none", help="integrations of the Trainer, such as wandb")

    def __post_init__(self) -> None:
        # TrainingArguments replaces a missing folder by "trainer_output" in the working directory.
        self.record_folder = self.output_dir
        super().__post_init__()
        if not (self.do_train and self.do_eval):
            raise ValueError("a measurement trains and evaluates: leave out --no_do_train and --no_do_eval")
        if self.save_strategy != SaveStrategy.NO:
            raise ValueError("--save_strategy: a measurement keeps no checkpoints; leave it out")
        if self.push_to_hub:
            raise ValueError("--push_to_hub: a measurement keeps no model that could be pushed; leave it out")


# The training flags that a training always depends on.
TRAINING_FLAGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps"),
)
# Flags that change no result; --seed is in a record as `seeds`.
HARMLESS = {"per_device_eval_batch_size", "output_dir", "seed", "do_train", "do_eval", "report_to", "disable_tqdm"}
# Training flags whose values neither argparse nor TrainingArguments checks: the accepted range, in words and as a test.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "num_train_epochs"),
        ("a finite number of 0 or more", lambda value: 0 <= value < math.inf),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("in [0, 1)", lambda value: 0 <= value < 1)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        ("1 or more", lambda value: value >= 1),
    ),
    "eval_steps": ("a number of steps, 1 or more", lambda value: value is None or value >= 1),
    "seed": ("in [0, 2^32)", lambda value: 0 <= value < SEEDS),
}


class DownstreamParser(Parser, HfArgumentParser):
    """A parser of dataclasses that takes both spellings of a flag, as all programs do."""


def downstream_parser(options: type[DownstreamArguments], description: str) -> DownstreamParser:
    """The parser of a downstream script: its own flags, and those of training."""
    classes: list[Any] = [options, DownstreamTrainingArguments]
    return DownstreamParser(classes, description=description, formatter_class=HelpFormatter)


def parse_arguments(parser: DownstreamParser, arguments: list[str] | None) -> tuple[Any, DownstreamTrainingArguments, dict]:
    """The two dataclasses of the parser, and the training flags with another value than their default.

    An unknown flag or a value that TrainingArguments refuses is a usage error: exit code 2.
    """
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # Parsed, because argparse converts defaults that are strings.
    defaults = vars(parser.parse_args([]))
    training_names = {field.name for field in dataclasses.fields(DownstreamTrainingArguments)}
    changed = {
        name: value for name, value in sorted(vars(namespace).items()) if name in training_names and value != defaults[name]
    }
    for name, (accepted, is_accepted) in RANGES.items():
        if not is_accepted(getattr(namespace, name)):
            parser.error(f"--{name}: {getattr(namespace, name)} is not {accepted}")
    try:
        options, training = parser.parse_dict(vars(namespace))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if options.max_train_samples is not None and options.max_train_samples < 2:
        parser.error(f"--max_train_samples: {options.max_train_samples} is less than 2, one sentence for each of two classes")
    if options.max_seq_length < 3:
        parser.error(f"--max_seq_length: {options.max_seq_length} is less than 3, for [CLS], a word and [SEP]")
    return options, training, changed


def parse_integers(name: str, text: str, least: int, most: int) -> list[int]:
    """The distinct integers of a flag, separated by commas, in the order of the text; each in [least, most]."""
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdecimal() and least <= int(part) <= most]
    if len(set(numbers)) < len(parts):
        raise InputError(f"--{name}: {text!r}; give distinct integers from {least} to {most}, separated by commas")
    return numbers


def training_steps(training: TrainingArguments, sentences: int) -> int:
    """Optimizer steps of a training on `sentences` sentences; more than the warm-up, so that --learning_rate is reached."""
    batch_size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(sentences / batch_size))
    if steps < 1:
        raise InputError(f"--num_train_epochs {training.num_train_epochs:g}: gives no training step; give more")
    if training.get_warmup_steps(steps) >= steps:
        raise InputError(
            f"--warmup_steps {training.warmup_steps:g}: the training has {steps} steps ({sentences} sentences, batches of "
            f"{batch_size}, {training.num_train_epochs:g} epochs); give fewer, or more --num_train_epochs"
        )
    return steps


def plain_flags(training: TrainingArguments, names: tuple[str, ...]) -> dict[str, Any]:
    """The values of some training flags, for a record: enumerations by their value."""
    return {name: getattr(getattr(training, name), "value", getattr(training, name)) for name in names}


def record_inputs(
    task: Task, options: DownstreamArguments, model: dict[str, str] | None
) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """The files and the model (None: no model) of a record, and the flags on data that its value depends on."""
    inputs = {**task.inputs(), **({} if model is None else {"model": model})}
    return inputs, {flag: getattr(options, flag) for flag in ("max_seq_length", "max_train_samples", "tokenization")}


def measure_accuracy(
    folder: Path,
    name: str,
    kind: type[ProbeRecord] | type[FinetuneRecord],
    task: Task,
    options: DownstreamArguments,
    training: TrainingArguments,
    model: dict[str, str] | None,
    flags: dict[str, Any],
    run: Callable[[list[int]], tuple[list[dict[str, Any]], dict[str, Any]]],
    further_files: tuple[str, ...] = (),
) -> None:
    """Measure over seeds and write record `name` of `folder`, unless it is complete.

    `value` is the mean over seeds of the accuracy at the end of training. `standard_error` is over seeds (None with one seed).
    `sampling_standard_error` is sqrt(a (1 - a) / n), the standard deviation over validation samples of n sentences.

    Args:
        model: description of the model, for the record; None for a control without one.
        flags: arguments that the value depends on, in addition to those on data and seeds.
        run: from seeds to one dict each ("last" and "best" validation accuracy, "train" on the training part), and further
            fields of the record.
        further_files: other results in `folder`; without one of them the record is not complete.
    """
    seeds = [training.seed] if options.seeds is None else parse_integers("seeds", options.seeds, 0, SEEDS - 1)
    inputs, data_flags = record_inputs(task, options, model)
    arguments = {**flags, **data_flags, "seeds": seeds}
    is_complete = is_measured(folder, name, inputs, arguments, options.overwrite)
    if is_complete and all((folder / file).exists() for file in further_files):
        print(f"{folder}: {name} is measured already, skipped (--overwrite measures again)")
        return
    started = time.monotonic()
    runs, details = run(seeds)
    last = np.array([result["last"] for result in runs])
    n = len(task.validation)
    value = float(last.mean())
    fields = {
        "task": task.name,
        "best_accuracies": [result["best"] for result in runs],
        "train_accuracies": [result["train"] for result in runs],
        "classes": len(task.classes),
        "train_n": len(task.train),
        "overlap": task.overlap,
        **details,
    }
    record = kind(
        value=value,
        standard_error=float(last.std(ddof=1) / np.sqrt(len(last))) if len(last) > 1 else None,
        n=n,
        unit="accuracy (share of validation sentences)",
        seeds=seeds,
        accuracies=last.tolist(),
        sampling_standard_error=float(np.sqrt(value * (1 - value) / n)),
        best_accuracy=float(np.mean(fields["best_accuracies"])),
        majority=task.majority,
        inputs=inputs,
        arguments=arguments,
        seconds=time.monotonic() - started,
        device=str(training.device),
        **fields,
    )
    write_record(folder, name, record)
    print(f"{folder}: {record.measurement} {task.name}: {describe_accuracy(record)}")


def describe_accuracy(record: AccuracyRecord) -> str:
    """One line on an accuracy and its errors, in %."""
    errors = ["no standard error with one seed"]
    if record.standard_error is not None:
        seeds = len(record.accuracies)
        half = special.stdtrit(seeds - 1, 0.975) * record.standard_error
        errors = [f"standard error {100 * record.standard_error:.2f} over {seeds} seeds, 95% by Student's t ± {100 * half:.2f}"]
    low, high = wilson(record.value, record.n)
    errors.append(f"95% by Wilson for {record.n} sentences {100 * low:.2f} to {100 * high:.2f}")
    if isinstance(record, ProbeRecord) and record.bootstrap:
        errors.append(f"± {100 * record.bootstrap.standard_error:.2f} over {record.bootstrap.replicates} samples of the data")
    errors.append(f"majority {100 * record.majority:.2f}%")
    return f"accuracy {100 * record.value:.2f}% ({'; '.join(errors)})"


def describe_curve(record: CurveRecord) -> str:
    """One line on accuracies by the number of labels, in %."""
    points = [
        f"{100 * point.accuracy.mean:.2f}% with {point.labels} labels (standard deviation between draws "
        f"{100 * point.accuracy.standard_error * point.draws**0.5:.2f})"
        + (f" ({point.missing_classes} of {point.draws} draws lack a class)" if point.missing_classes else "")
        for point in record.points
    ]
    return f"{'; '.join(points)}; means over {record.points[0].draws} draws; majority {100 * record.majority:.2f}%"
