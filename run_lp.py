"""Measure what a linear probe reads from pre-trained models: accuracy of a linear classifier on frozen features.

    python run_lp.py --model_name_or_path OUT/JOB --tokenizer_name bert-large-uncased \\
        --train_file pcfg_dataset/pcfg_B.csv --validation_file pcfg_dataset/pcfg_B_validation.csv --max_seq_length 32 \\
        --do_train --do_eval --evaluation_strategy steps --eval_steps 200 --per_device_train_batch_size 512 \\
        --per_device_eval_batch_size 512 --learning_rate 1e-3 --weight_decay 0.01 --max_grad_norm 1.0 \\
        --num_train_epochs 50 --lr_scheduler_type polynomial --warmup_steps 50 --seeds 0,1,2,3,4

The accuracy by the number of labelled sentences, in seconds for all models below a folder:

    python run_lp.py --model_name_or_path OUT --train_file pcfg_dataset/pcfg_B.csv \
        --validation_file pcfg_dataset/pcfg_B_validation.csv --solver ridge --label-counts 50,100,300,1000 --label-draws 20

The same for controls: the lookup table (the conditionals of the language itself), and one-hot words; a model folder of step 0
is the untrained model (all with the data flags above):

    python run_lp.py --features conditional --rule-path rule_deep_mlm.txt --output_dir OUT/lookup_table
    python run_lp.py --features words --output_dir OUT/words

On a laptop: --num_train_epochs 10 --seeds 0 (seconds per model of 4 layers and 10,000 sentences).

Estimator: share of validation sentences whose label is argmax_c (W x + b)_c, x the frozen features (Liu et al. 2023,
section 3), W and b by --solver. Errors are over --seeds (initialisation and order of AdamW; the split that chooses the strength
of L-BFGS) or --label-draws, of the validation sample, and with --bootstrap over resampled training and validation sentences.

The record is probe_TASK.json in the model folder (probe_lbfgs_mean_TASK.json and so on for other choices), with TASK the stem
of --train_file or --task_name; with --label-counts it is curve_TASK_SOLVER.json. A model with a record is skipped.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

from pcfg.common.cli import run_main, warn_of_flags
from pcfg.common.files import InputError
from pretraining.data.tasks import read_task
from pretraining.evaluation.downstream import DownstreamParser, DownstreamTrainingArguments, downstream_parser, parse_arguments
from pretraining.evaluation.probes import ProbeArguments, ineffective_flags, probe_lookup_table, probe_model, probe_words
from pretraining.evaluation.records import record_folder
from pretraining.model.checkpoints import find_model, model_folders


def build_parser() -> DownstreamParser:
    return downstream_parser(ProbeArguments, __doc__)


def check_options(options: ProbeArguments, training: DownstreamTrainingArguments) -> None:
    """Refuse flags that contradict each other."""
    tables = (options.condprobfile_train, options.condprobfile_validation)
    is_table = options.rule_path is not None or any(tables)
    if options.needs_model == (options.model_name_or_path is None) or (is_table and options.features == "words"):
        raise InputError(
            "what is probed? give either --model_name_or_path, or a lookup table by --features conditional and --rule-path "
            "(or --condprobfile_train and --condprobfile_validation), or --features words"
        )
    if options.features != "hidden" and options.pool == "cls":
        raise InputError(f"--pool cls: [CLS] has no {options.features}; give concat or mean")
    if options.bootstrap < 0 or options.bootstrap == 1:
        raise InputError(f"--bootstrap {options.bootstrap}: give 2 or more resampled data sets, or 0 for none")
    if is_table and options.task_name is not None:
        raise InputError("--task_name: a lookup table is of a grammar's sentences; give --train_file and --validation_file")
    if is_table and options.features != "conditional":
        raise InputError("--features hidden: a lookup table has no hidden states; give --features conditional")
    if is_table and (any(tables) if options.rule_path is not None else not all(tables)):
        raise InputError("give either --rule-path, or both --condprobfile_train and --condprobfile_validation")
    if not options.needs_model and training.record_folder is None:
        raise InputError("--output_dir: give the folder for the records of the lookup table or of the words")
    if not options.needs_model and options.records_path is not None:
        raise InputError(f"--records_path {options.records_path}: is for models; the records of a control go to --output_dir")
    if options.layer is not None and options.features != "hidden":
        raise InputError(
            f"--layer {options.layer}: only hidden states have layers; leave it out with --features {options.features}"
        )
    if options.position is not None and (options.position < 1 or options.pool != "concat"):
        raise InputError(f"--position {options.position}: give the number of a word, from 1, and no --pool")
    # flags that do not go with --label-counts, or with a solver that draws nothing
    is_curve = options.label_counts is not None
    if is_curve and options.method == "adamw":
        raise InputError("--label-counts: adamw's steps depend on the number of sentences; give --solver ridge or lbfgs")
    if is_curve and options.bootstrap:
        raise InputError(f"--bootstrap {options.bootstrap}: is for one training file; with --label-counts, leave it out")
    if is_curve and options.label_draws < 2:
        raise InputError(f"--label-draws {options.label_draws}: give 2 or more, for a standard error")
    if options.seeds is not None and (is_curve or options.method == "ridge"):
        raise InputError(f"--seeds {options.seeds}: only --label-draws are drawn here, without a seed; leave it out")


def main(arguments: list[str] | None = None) -> None:
    options, training, changed = parse_arguments(build_parser(), arguments)
    by = "" if options.method == "adamw" else f" by {options.method}"
    warn_of_flags(ineffective_flags(changed, options), f"a linear probe{by}")
    check_options(options, training)
    root = find_model(options.model_name_or_path) if options.needs_model else None
    folders = model_folders(root) if root else []
    task = read_task(options)
    if options.features == "words":
        probe_words(task, options, training)
    elif not folders:
        probe_lookup_table(task, options, training)
    for number, folder in enumerate(folders):
        print(f"linear probe {number + 1} of {len(folders)}: {folder}")
        probe_model(folder, record_folder(folder, root or folder, options.records_path), task, options, training)


if __name__ == "__main__":
    run_main(main, memory="number of labelled sentences, or --use_cpu")
