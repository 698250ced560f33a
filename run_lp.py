"""Measure what a linear probe reads from pre-trained models: accuracy of a linear classifier on frozen features.

    python run_lp.py --model_name_or_path OUT/JOB --tokenizer_name bert-large-uncased \\
        --train_file pcfg_dataset/pcfg_B.csv --validation_file pcfg_dataset/pcfg_B_validation.csv --max_seq_length 32 \\
        --do_train --do_eval --evaluation_strategy steps --eval_steps 200 --per_device_train_batch_size 512 \\
        --per_device_eval_batch_size 512 --learning_rate 1e-3 --weight_decay 0.01 --max_grad_norm 1.0 \\
        --num_train_epochs 50 --lr_scheduler_type polynomial --warmup_steps 50 --seeds 0,1,2,3,4

The same for the lookup table (the conditionals of the language itself):

    python run_lp.py --features conditional --rule-path rule_deep_mlm.txt --output_dir OUT/lookup_table (and the data and
        training flags above)

On a laptop: --num_train_epochs 10 --seeds 0 (seconds per model of 4 layers and 10,000 sentences).

Estimator: share of validation sentences whose label is argmax_c (W x + b)_c, x the frozen features (Liu et al. 2023,
section 3), W and b by --solver. Errors are over --seeds (initialisation and order of AdamW; the split that chooses the strength
of L-BFGS), of the validation sample (binomial), and with --bootstrap over resampled training and validation sentences.

The record is probe_TASK.json in the model folder (probe_lbfgs_mean_TASK.json and so on for other choices), with TASK the stem
of --train_file or --task_name. A model with a record is skipped.
"""

from pcfg.common.cli import run_main
from pcfg.common.files import InputError
from pretraining.data.tasks import read_task
from pretraining.evaluation.downstream import DownstreamParser, DownstreamTrainingArguments, downstream_parser, parse_arguments
from pretraining.evaluation.probes import ProbeArguments, ineffective_flags, probe_lookup_table, probe_model
from pretraining.model.checkpoints import find_model, model_folders


def build_parser() -> DownstreamParser:
    return downstream_parser(ProbeArguments, __doc__)


def check_options(options: ProbeArguments, training: DownstreamTrainingArguments) -> bool:
    """Whether a lookup table is probed, and not a model; refuse flags that contradict each other."""
    tables = (options.condprobfile_train, options.condprobfile_validation)
    is_table = options.rule_path is not None or any(tables)
    if is_table == (options.model_name_or_path is not None):
        raise InputError(
            "what is probed? give either --model_name_or_path, or a lookup table by --features conditional and --rule-path "
            "(or --condprobfile_train and --condprobfile_validation)"
        )
    if options.features == "conditional" and options.pool == "cls":
        raise InputError("--pool cls: [CLS] has no conditional; give concat or mean")
    if options.bootstrap < 0 or options.bootstrap == 1:
        raise InputError(f"--bootstrap {options.bootstrap}: give 2 or more resampled data sets, or 0 for none")
    if is_table and options.task_name is not None:
        raise InputError("--task_name: a lookup table is of a grammar's sentences; give --train_file and --validation_file")
    if is_table and options.features != "conditional":
        raise InputError("--features hidden: a lookup table has no hidden states; give --features conditional")
    if is_table and (any(tables) if options.rule_path is not None else not all(tables)):
        raise InputError("give either --rule-path, or both --condprobfile_train and --condprobfile_validation")
    if is_table and training.record_folder is None:
        raise InputError("--output_dir: give the folder for the lookup table's records")
    return is_table


def main(arguments: list[str] | None = None) -> None:
    options, training, changed = parse_arguments(build_parser(), arguments)
    if ignored := ineffective_flags(changed, options.solver):
        by = "" if options.solver == "adamw" else f" by {options.solver}"
        print(f"warning: no effect on a linear probe{by}: {', '.join('--' + name for name in ignored)}")
    is_table = check_options(options, training)
    folders = [] if is_table else model_folders(find_model(options.model_name_or_path))
    task = read_task(options)
    if is_table:
        probe_lookup_table(task, options, training)
    for number, folder in enumerate(folders):
        print(f"linear probe {number + 1} of {len(folders)}: {folder}")
        probe_model(folder, task, options, training)


if __name__ == "__main__":
    run_main(main)
