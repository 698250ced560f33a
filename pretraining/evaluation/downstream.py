"""What the two downstream measurements have in common: command-line arguments and the record of accuracies."""

import argparse
import dataclasses
import math
import time
from typing import Literal

import numpy as np
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pcfg.common.files import InputError
from pretraining.data.tasks import GLUE, Task
from pretraining.evaluation.records import RECORDS, AccuracyRecord, ProbeRecord, is_measured, write_record

SEEDS = 1 << 32  # numpy, which the Trainer seeds, knows no more


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and each flag's default."""


@dataclasses.dataclass(kw_only=True)
class DownstreamArguments:
    """Model, data and seeds of a downstream measurement."""

    _argument_group_name = "model and data"

    model_name_or_path: str | None = HfArg(
        default=None,
        help="model folder, folder with model folders at any depth (measured in turn), or a name on the hub",
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="tokenizer, looked up in the model folder first; it must have the model's vocabulary"
    )
    task_name: str | None = HfArg(
        default=None,
        help=f"a GLUE task ({', '.join(GLUE)}), from the hub or from files with its columns",
    )
    train_file: str | None = HfArg(default=None, help="file to train on: CSV text,label; or, with --task_name, GLUE's columns")
    validation_file: str | None = HfArg(default=None, help="file to measure the accuracy on, of the same kind")
    max_train_samples: int | None = HfArg(default=None, help="train on the first ones of the training file only; default: all")
    max_seq_length: int = HfArg(
        default=32,
        help="positions of the concatenated features, in tokens with [CLS] and [SEP]; a longer sentence is an error, or is cut "
        "in natural text",
    )
    tokenization: Literal["auto", "words", "pieces"] = HfArg(
        default="auto",
        help="words: one token a word, an unknown one is an error; pieces: natural text, the tokenizer splits words, and "
        "what is unknown or cut is counted; auto: pieces with --task_name",
    )
    seeds: str | None = HfArg(
        default=None,
        help="seeds of initialisation and order, separated by commas: one run each, and a standard error over them; "
        "without it the one of --seed",
    )
    overwrite: bool = HfArg(default=False, help="measure again what has a record already")


@dataclasses.dataclass
class DownstreamTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with the old name of --eval_strategy and the defaults of a measurement."""

    _argument_group_name = "training (Hugging Face TrainingArguments)"

    eval_strategy: IntervalStrategy | str = HfArg(
        default="no",
        aliases=["--evaluation_strategy"],
        help="when to measure in between, for the best accuracy: no, steps (every --eval_steps) or epoch",
    )
    save_strategy: SaveStrategy | str = HfArg(default="no", help="no: a measurement keeps no checkpoints")
    output_dir: str | None = HfArg(
        default=None, help="folder for the lookup table's records (run_lp); a model's go into the model's own folder"
    )
    do_train: bool = HfArg(default=True, help="accepted for compatibility: a measurement always trains")
    do_eval: bool = HfArg(default=True, help="accepted for compatibility: a measurement always evaluates")
    seed: int = HfArg(default=0, help="the seed where --seeds is not given")
    report_to: None | str | list[str] = HfArg(default="none", help="integrations of the Trainer, such as wandb")

    def __post_init__(self):
        # TrainingArguments replaces a missing folder by "trainer_output" in the working directory.
        self.wanted_output_dir = self.output_dir
        super().__post_init__()
        if not (self.do_train and self.do_eval):
            raise ValueError("a measurement trains and evaluates: leave out --no_do_train and --no_do_eval")
        if self.save_strategy != SaveStrategy.NO:
            raise ValueError("--save_strategy: a measurement keeps no checkpoints; leave it out")


# Training flags whose values neither argparse nor TrainingArguments checks: what is accepted, and the test for it.
RANGES = {
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


def parse_arguments(parser: HfArgumentParser, arguments: list[str] | None) -> tuple:
    """The parser's two dataclasses, and the training flags that were given another value than their default.

    A flag that does not exist or a value that TrainingArguments refuses is a usage error: exit code 2.

    Returns:
        options, training, given: dict from flag to value, sorted.
    """
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # What the parser makes of the defaults: argparse converts those that are strings.
    defaults = vars(parser.parse_args([]))
    training_names = {field.name for field in dataclasses.fields(DownstreamTrainingArguments)}
    given = {
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
        parser.error(f"--max_train_samples: {options.max_train_samples} is less than 2, one sentence of each of two classes")
    if options.max_seq_length < 3:
        parser.error(f"--max_seq_length: {options.max_seq_length} is less than 3, the room for [CLS], a word and [SEP]")
    return options, training, given


def parse_seeds(options: DownstreamArguments, training: TrainingArguments) -> list[int]:
    """The seeds of --seeds, or the one of --seed.

    Raises:
        InputError: not distinct integers in [0, 2^32).
    """
    if options.seeds is None:
        return [training.seed]
    parts = options.seeds.split(",")
    seeds = [int(part) for part in parts if part.strip().isdecimal() and int(part) < SEEDS]
    if len(set(seeds)) < len(parts):
        raise InputError(f"--seeds: {options.seeds!r}; give distinct integers in [0, 2^32), such as 0,1,2")
    return seeds


def training_steps(training: TrainingArguments, sentences: int) -> int:
    """Optimizer steps of a training on `sentences` sentences.

    Raises:
        InputError: there are none, or the warm-up takes all of them, so that the learning rate asked for is never reached.
    """
    batch_size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(sentences / batch_size))
    if steps < 1:
        raise InputError(f"--num_train_epochs {training.num_train_epochs:g}: that is no training step; give more")
    if training.get_warmup_steps(steps) >= steps:
        raise InputError(
            f"--warmup_steps {training.warmup_steps:g}: the training has {steps} steps ({sentences} sentences, batches of "
            f"{batch_size}, {training.num_train_epochs:g} epochs); give fewer, or more --num_train_epochs"
        )
    return steps


def data_arguments(options: DownstreamArguments, seeds: list[int]) -> dict:
    """What a record keeps of the flags on data and seeds."""
    names = ("max_seq_length", "max_train_samples", "tokenization")
    return {**{name: getattr(options, name) for name in names}, "seeds": seeds}


def measure_accuracy(folder, name: str, measurement: str, task: Task, seeds: list[int], run, **record) -> AccuracyRecord | None:
    """Measure over seeds and write record `name` of `folder`, unless it is there already; None if so.

    `value` is the mean over seeds of the accuracy at the end of training. `standard_error` is over seeds (None with one seed);
    `sampling_standard_error` is sqrt(a (1 - a) / n), how far the accuracy of another validation sample of n sentences would be.

    Args:
        run: from the list of seeds to one dict a seed ("last" and "best" accuracy, on the training part "train") and a dict of
            further details of the record.
        record: inputs, arguments, device, `overwrite` and further details of the record.

    Raises:
        InputError: the record was made otherwise and `overwrite` is not set.
    """
    if is_measured(folder, name, record["inputs"], record["arguments"], record.pop("overwrite")):
        print(f"{folder}: {name} is measured already, skipped (--overwrite measures again)")
        return None
    started = time.monotonic()
    runs, details = run(seeds)
    last, n = np.array([result["last"] for result in runs]), len(task.validation)
    value = float(last.mean())
    over_seeds = float(last.std(ddof=1) / np.sqrt(len(last))) if len(last) > 1 else None
    written = RECORDS[measurement](
        value=value,
        standard_error=over_seeds,
        n=n,
        unit="accuracy (share of validation sentences)",
        task=task.name,
        seeds=seeds,
        accuracies=last.tolist(),
        sampling_standard_error=float(np.sqrt(value * (1 - value) / n)),
        best_accuracy=float(np.mean([result["best"] for result in runs])),
        best_accuracies=[result["best"] for result in runs],
        train_accuracies=[result["train"] for result in runs],
        majority=task.majority,
        classes=len(task.classes),
        train_n=len(task.train),
        overlap=task.overlap,
        seconds=time.monotonic() - started,
        **details,
        **record,
    )
    write_record(folder, name, written)
    print(f"{folder}: {measurement} {task.name}: {describe_accuracy(written)}")
    return written


def describe_accuracy(record: AccuracyRecord) -> str:
    """One line on an accuracy and its errors, in %."""
    errors = ["no standard error with one seed"]
    if record.standard_error is not None:
        errors = [f"± {100 * record.standard_error:.2f} over {len(record.accuracies)} seeds"]
    errors.append(f"± {100 * record.sampling_standard_error:.2f} for {record.n} sentences")
    if isinstance(record, ProbeRecord) and record.bootstrap:
        errors.append(f"± {100 * record.bootstrap.standard_error:.2f} over {record.bootstrap.replicates} samples of the data")
    errors.append(f"majority {100 * record.majority:.2f}%")
    return f"accuracy {100 * record.value:.2f}% ({'; '.join(errors)})"
