"""What the two downstream measurements have in common: command-line arguments, labelled data and the record of accuracies."""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pcfg.artefacts import InputError
from pcfg.text import read_labelled
from pretraining.data.vocabulary import check_single_tokens, resolve_tokenizer
from pretraining.evaluation.contexts import Contexts, check_length, from_texts
from pretraining.evaluation.records import describe_file, is_measured, write_record
from pretraining.model.checkpoints import load_vocabulary
from pretraining.model.config import ModelConfig

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
    train_file: str = HfArg(help="CSV file text,label to train on")
    validation_file: str = HfArg(help="CSV file text,label to measure the accuracy on")
    max_seq_length: int = HfArg(
        default=32, help="positions of the concatenated features, in tokens with [CLS] and [SEP]; nothing is ever cut"
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
    defaults = vars(parser.parse_args(["--train_file", "", "--validation_file", ""]))
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


@dataclasses.dataclass
class Task:
    """Labelled sentences to train on and to measure on.

    Args:
        name: stem of the training file.
        train_texts, validation_texts: sentences.
        train_labels, validation_labels: (sentences,) int64 indices into `classes`.
        classes: the labels that occur, sorted.
        majority: share of validation sentences with the most frequent training label: what no features give.
        overlap: number of validation sentences that are also training sentences.
    """

    name: str
    train_file: Path
    validation_file: Path
    train_texts: list[str]
    validation_texts: list[str]
    train_labels: np.ndarray
    validation_labels: np.ndarray
    classes: list[int]
    majority: float
    overlap: int

    def inputs(self) -> dict:
        """The files, for a record."""
        return {"train": describe_file(self.train_file), "validation": describe_file(self.validation_file)}


def read_task(train_file, validation_file) -> Task:
    """Read and check the two files of a task; prints a warning for sentences that are in both.

    Raises:
        InputError: a file or a column is missing, a label is no integer, or there is one class only.
    """
    train_texts, train = read_labelled(train_file)
    validation_texts, validation = read_labelled(validation_file)
    if len(set(train)) < 2:
        raise InputError(f"{train_file}: all labels are {train[0]}; a task needs at least 2 classes")
    classes = sorted({*train, *validation})
    train_labels, validation_labels = np.searchsorted(classes, train), np.searchsorted(classes, validation)
    seen, shared = set(train), set(train_texts)
    unseen = sum(label not in seen for label in validation)
    if unseen:
        print(f"warning: {unseen} sentences of {validation_file} have a label that no training sentence has")
    overlap = sum(text in shared for text in validation_texts)
    if overlap:
        print(f"warning: {overlap} of {len(validation)} sentences of {validation_file} are also in {train_file}")
    majority = float((validation_labels == np.bincount(train_labels).argmax()).mean())
    return Task(
        Path(train_file).stem,
        Path(train_file),
        Path(validation_file),
        train_texts,
        validation_texts,
        train_labels,
        validation_labels,
        classes,
        majority,
        overlap,
    )


def check_max_seq_length(words: np.ndarray, max_seq_length: int, source) -> None:
    """Refuse sentences that need more positions than there are.

    Args:
        words: (sentences,) words of each sentence.

    Raises:
        InputError: names the sentence and the length needed.
    """
    longest = int(np.argmax(words))
    if words[longest] + 2 > max_seq_length:
        raise InputError(
            f"{source}: sentence {longest + 1} has {words[longest]} words; with [CLS] and [SEP] it needs "
            f"--max_seq_length {words[longest] + 2} or more, not {max_seq_length}"
        )


def encode_task(task: Task, folder: Path, config: ModelConfig, options: DownstreamArguments) -> tuple[Contexts, Contexts]:
    """The sentences of `task` as inputs of the model in `folder`: training part, validation part.

    Raises:
        InputError: the tokenizer is another one, a word is unknown or split, or a sentence is too long.
    """
    vocabulary = load_vocabulary(folder)
    if options.tokenizer_name is not None:
        tokenizer = resolve_tokenizer(options.tokenizer_name, [folder])
        if tokenizer.get_vocab() != vocabulary.ids:
            raise InputError(
                f"--tokenizer_name {options.tokenizer_name}: its {len(tokenizer)} words are not the {vocabulary.size} of "
                f"the model in {folder}; leave the flag out to take the model's own"
            )
        words = sorted({word for text in (*task.train_texts, *task.validation_texts) for word in text.split()})
        check_single_tokens(tokenizer, words)
    parts = []
    for texts, source in ((task.train_texts, task.train_file), (task.validation_texts, task.validation_file)):
        contexts = from_texts(texts, vocabulary, source)
        check_max_seq_length(contexts.lengths - 2, options.max_seq_length, source)
        check_length(contexts, config, source)
        parts.append(contexts)
    return parts[0], parts[1]


def measure_accuracy(folder, name: str, measurement: str, task: Task, seeds: list[int], run, **record) -> dict | None:
    """Measure over seeds and write record `name` of `folder`, unless it is there already; None if so.

    `value` is the mean over seeds of the accuracy at the end of training, which is never chosen on the validation sentences.
    `standard_error` is over seeds (None with one seed); `sampling_standard_error` is sqrt(a (1 - a) / n), how far the
    accuracy of another validation sample of n sentences would be.

    Args:
        run: from the list of seeds to one dict a seed: "last" and "best" accuracy, on the training part "train".
        record: inputs, arguments, device, `overwrite` and further details of the record.

    Raises:
        InputError: the record was made otherwise and `overwrite` is not set.
    """
    if is_measured(folder, name, record["inputs"], record["arguments"], record.pop("overwrite")):
        print(f"{folder}: {name} is measured already, skipped")
        return None
    started = time.monotonic()
    runs = run(seeds)
    last, n = np.array([result["last"] for result in runs]), len(task.validation_labels)
    value = float(last.mean())
    over_seeds = float(last.std(ddof=1) / np.sqrt(len(last))) if len(last) > 1 else None
    written = write_record(
        folder,
        name,
        measurement=measurement,
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
        train_n=len(task.train_labels),
        overlap=task.overlap,
        seconds=time.monotonic() - started,
        **record,
    )
    error = "no standard error with one seed" if over_seeds is None else f"± {100 * over_seeds:.2f} over {len(last)} seeds"
    print(
        f"{folder}: {measurement} {task.name}: accuracy {100 * value:.2f}% ({error}; "
        f"± {100 * written['sampling_standard_error']:.2f} for {n} sentences; majority {100 * task.majority:.2f}%)"
    )
    return written
