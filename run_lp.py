"""Measure what a linear probe reads from pre-trained models: accuracy of a linear classifier on frozen features.

    python run_lp.py --model_name_or_path OUT/JOB --tokenizer_name bert-large-uncased \\
        --train_file pcfg_dataset/pcfg_B.csv --validation_file pcfg_dataset/pcfg_B_validation.csv --max_seq_length 32 \\
        --do_train --do_eval --evaluation_strategy steps --eval_steps 200 --per_device_train_batch_size 512 \\
        --per_device_eval_batch_size 512 --learning_rate 1e-3 --weight_decay 0.01 --max_grad_norm 1.0 \\
        --num_train_epochs 50 --lr_scheduler_type polynomial --warmup_steps 50 --seeds 0,1,2,3,4

The lookup table (the language's own conditionals) probed in the same way:

    python run_lp.py --features conditional --rule-path rule_deep_mlm.txt --output_dir OUT/lookup_table (and the data and
        training flags above)

On a laptop: --num_train_epochs 10 --seeds 0 (seconds a model of 4 layers and 10,000 sentences).

Features are the last hidden states of all positions, concatenated (zeros at padding), computed once in eval mode; the head is
trained with AdamW (Liu et al. 2023, section 3). The record is the validation accuracy at the end, its mean and standard error
over --seeds, as probe_TASK.json in the model's folder, TASK being the stem of --train_file. A model that has its record is
skipped.
"""

import dataclasses
from typing import Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from pcfg.artefacts import InputError
from pcfg.cli import run_main
from pretraining.evaluation.downstream import (
    DownstreamArguments,
    DownstreamTrainingArguments,
    HelpFormatter,
    parse_arguments,
    read_task,
)
from pretraining.evaluation.probes import ineffective_flags, probe_lookup_table, probe_model
from pretraining.model.checkpoints import find_model, model_folders


@dataclasses.dataclass(kw_only=True)
class ProbeArguments(DownstreamArguments):
    """The features of a probe, besides model and data."""

    features: Literal["hidden", "conditional"] = HfArg(
        default="hidden",
        help="hidden: last hidden states; conditional: the distribution of the word at each position given the rest, a "
        "model's prediction or, with --rule-path or --condprobfile_*, the language's own (the lookup table)",
    )
    rule_path: str | None = HfArg(default=None, help="grammar whose conditionals are probed; a bare name may be a shipped one")
    condprobfile_train: str | None = HfArg(
        default=None, help="lookup table made for --train_file by python -m pcfg.lookup, instead of --rule-path"
    )
    condprobfile_validation: str | None = HfArg(default=None, help="lookup table made for --validation_file")


def build_parser() -> HfArgumentParser:
    classes = (ProbeArguments, DownstreamTrainingArguments)
    return HfArgumentParser(classes, description=__doc__, formatter_class=HelpFormatter)


def check_what_is_probed(options: ProbeArguments, training: DownstreamTrainingArguments) -> bool:
    """Whether the lookup table is probed, and not a model.

    Raises:
        InputError: the flags name neither, or both, or one by halves.
    """
    tables = (options.condprobfile_train, options.condprobfile_validation)
    is_table = options.rule_path is not None or any(tables)
    if is_table == (options.model_name_or_path is not None):
        raise InputError(
            "what is probed? give either --model_name_or_path, or a lookup table by --features conditional and --rule-path "
            "(or --condprobfile_train and --condprobfile_validation)"
        )
    if is_table and options.features != "conditional":
        raise InputError("--features hidden: a lookup table has no hidden states; give --features conditional")
    if is_table and (any(tables) if options.rule_path is not None else not all(tables)):
        raise InputError("give either --rule-path, or both --condprobfile_train and --condprobfile_validation")
    if is_table and training.wanted_output_dir is None:
        raise InputError("--output_dir: give the folder for the lookup table's records")
    return is_table


def main(arguments: list[str] | None = None) -> None:
    options, training, given = parse_arguments(build_parser(), arguments)
    if ignored := ineffective_flags(given):
        print(f"warning: no effect on a linear probe: {', '.join('--' + name for name in ignored)}")
    is_table = check_what_is_probed(options, training)
    folders = [] if is_table else model_folders(find_model(options.model_name_or_path))
    task = read_task(options.train_file, options.validation_file)
    if is_table:
        probe_lookup_table(task, options, training)
    for number, folder in enumerate(folders):
        print(f"linear probe {number + 1} of {len(folders)}: {folder}")
        probe_model(folder, task, options, training)


if __name__ == "__main__":
    run_main(main)
