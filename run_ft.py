"""Fine-tune pre-trained models on a downstream task and record the accuracy, with Hugging Face's Trainer.

    python run_ft.py --model_name_or_path OUT/JOB --tokenizer_name bert-large-uncased \\
        --train_file pcfg_dataset/pcfg_B.csv --validation_file pcfg_dataset/pcfg_B_validation.csv --max_seq_length 32 \\
        --do_train --do_eval --evaluation_strategy steps --eval_steps 200 --per_device_train_batch_size 128 \\
        --per_device_eval_batch_size 128 --learning_rate 1e-4 --weight_decay 0.01 --max_grad_norm 1.0 \\
        --num_train_epochs 50 --lr_scheduler_type polynomial --warmup_steps 50 --seeds 0,1,2,3,4

On a laptop: --num_train_epochs 3 --seeds 0, and training and validation files of 2,000 sentences (a minute a model).

Encoder and a linear head on the concatenated last hidden states of all positions are trained; the record is the validation
accuracy at the end, its mean and standard error over --seeds, the best accuracy on the way beside it (Liu et al. 2023,
appendix A). It is written as finetune_TASK.json into the model's folder, TASK being the stem of --train_file. A model that
has its record is skipped.
"""

from transformers import HfArgumentParser

from pcfg.artefacts import InputError
from pcfg.cli import run_main
from pretraining.evaluation.downstream import (
    DownstreamArguments,
    DownstreamTrainingArguments,
    HelpFormatter,
    parse_arguments,
    read_task,
)
from pretraining.evaluation.finetuning import finetune_model
from pretraining.model.checkpoints import find_model, model_folders


def build_parser() -> HfArgumentParser:
    dataclasses = (DownstreamArguments, DownstreamTrainingArguments)
    return HfArgumentParser(dataclasses, description=__doc__, formatter_class=HelpFormatter)


def main(arguments: list[str] | None = None) -> None:
    options, training, given = parse_arguments(build_parser(), arguments)
    if options.model_name_or_path is None:
        raise InputError("--model_name_or_path: give a model folder, or a folder that holds model folders")
    folders = model_folders(find_model(options.model_name_or_path))
    task = read_task(options.train_file, options.validation_file)
    for number, folder in enumerate(folders):
        print(f"fine-tuning {number + 1} of {len(folders)}: {folder}")
        finetune_model(folder, task, options, training, given)


if __name__ == "__main__":
    run_main(main)
