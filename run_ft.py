"""Fine-tune pre-trained models on a downstream task and record the accuracy, with Hugging Face's Trainer.

    python run_ft.py --model_name_or_path OUT/JOB --tokenizer_name bert-large-uncased \\
        --train_file pcfg_dataset/pcfg_B.csv --validation_file pcfg_dataset/pcfg_B_validation.csv --max_seq_length 32 \\
        --do_train --do_eval --evaluation_strategy steps --eval_steps 200 --per_device_train_batch_size 128 \\
        --per_device_eval_batch_size 128 --learning_rate 1e-4 --weight_decay 0.01 --max_grad_norm 1.0 \\
        --num_train_epochs 50 --lr_scheduler_type polynomial --warmup_steps 50 --seeds 0,1,2,3,4

On a laptop: --num_train_epochs 3 --seeds 0, and training and validation files of 2,000 sentences (a minute per model).

A GLUE task, from the cache of the hub or from files with its columns, and predictions of its test sentences:

    python run_ft.py --model_name_or_path MODEL --task_name qnli --max_seq_length 128 --do_predict
    python run_ft.py --model_name_or_path MODEL --task_name qnli --train_file train.tsv --validation_file dev.tsv \\
        --max_seq_length 128 --do_predict --test_file test.tsv

Estimator: share of validation sentences whose label is argmax_c (W x + b)_c, x the concatenated last hidden states. Encoder, W
and b are trained together on the mean cross-entropy (Devlin et al. 2019, section 4; Liu et al. 2023, appendix A). The record
has the accuracy at the end of training and the best one, with errors over --seeds (initialisation of the head, order, dropout)
and of the validation sample (binomial).

The record is finetune_TASK.json in the model folder, with TASK the stem of --train_file or --task_name; --do_predict adds
finetune_TASK_predictions.csv. A model with a record is skipped.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

from transformers.trainer_utils import IntervalStrategy

from pcfg.common.cli import run_main, warn_of_flags
from pcfg.common.files import InputError
from pretraining.data.tasks import read_task
from pretraining.evaluation.downstream import DownstreamParser, DownstreamTrainingArguments, downstream_parser, parse_arguments
from pretraining.evaluation.finetuning import INEFFECTIVE, FinetuningArguments, finetune_model
from pretraining.evaluation.records import record_folder
from pretraining.model.checkpoints import find_model, model_folders


def build_parser() -> DownstreamParser:
    return downstream_parser(FinetuningArguments, __doc__)


def check_options(options: FinetuningArguments, training: DownstreamTrainingArguments) -> None:
    """Refuse flags that have no effect without another flag."""
    if options.early_stopping_patience is not None and options.early_stopping_patience < 1:
        raise InputError(f"--early_stopping_patience {options.early_stopping_patience}: give 1 or more evaluations")
    if options.early_stopping_patience is not None and training.eval_strategy == IntervalStrategy.NO:
        raise InputError("--early_stopping_patience: needs evaluations during training: give --eval_strategy steps or epoch")
    if options.test_file is not None and not training.do_predict:
        raise InputError("--test_file: only predictions use it: give --do_predict too")


def main(arguments: list[str] | None = None) -> None:
    options, training, changed = parse_arguments(build_parser(), arguments)
    if options.model_name_or_path is None:
        raise InputError("--model_name_or_path: give a model folder, or a folder that holds model folders")
    check_options(options, training)
    warn_of_flags(changed.keys() & (INEFFECTIVE | ({"seed"} if options.seeds is not None else set())), "fine-tuning")
    root = find_model(options.model_name_or_path)
    folders = model_folders(root)
    task = read_task(options, with_test=training.do_predict)
    for number, folder in enumerate(folders):
        print(f"fine-tuning {number + 1} of {len(folders)}: {folder}")
        finetune_model(folder, record_folder(folder, root, options.records_path), task, options, training, changed)


if __name__ == "__main__":
    run_main(main, memory="--per_device_train_batch_size")
