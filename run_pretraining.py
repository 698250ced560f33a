"""Masked-LM pre-training on DeepSpeed.

    deepspeed --master_port 32056 run_pretraining.py --model_type bert-mlm --tokenizer_name bert-large-uncased \\
        --hidden_act gelu --hidden_size 1024 --num_hidden_layers 16 --num_attention_heads 16 --intermediate_size 4096 \\
        --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1 --encoder_ln_mode pre-ln --lr 5e-4 \\
        --train_batch_size 4096 --train_micro_batch_size_per_gpu 1024 --lr_schedule time --curve linear \\
        --warmup_proportion 0.20 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01 --adam_beta1 0.9 \\
        --adam_beta2 0.98 --adam_eps 1e-6 --dataset_path pcfg_dataset/pretraining --output_dir OUT --print_steps 100 \\
        --num_epochs_between_checkpoints 100000 --job_name JOB --project_name PROJECT --validation_epochs 3 \\
        --validation_epochs_begin 1 --validation_epochs_end 1 --validation_begin_proportion 0.05 \\
        --validation_end_proportion 0.01 --validation_micro_batch 16 --deepspeed --data_loader_type dist \\
        --do_validation --fp16

On a laptop, in one minute (plain python starts the same engine):

    python run_pretraining.py --dataset_path pcfg_dataset/pretraining --tokenizer_name bert-large-uncased \\
        --hidden_size 64 --num_hidden_layers 3 --num_attention_heads 4 --intermediate_size 256 --lr 1e-3 \\
        --train_batch_size 256 --train_micro_batch_size_per_gpu 256 --lr_schedule step --max_steps 500 \\
        --output_dir OUT --job_name small --save_steps 0,100

Model folders (OUT/JOB/step0000100: plain Hugging Face folders), metrics.jsonl and the training state go to OUT/JOB. An
epoch is one shard. Safe to interrupt: the same command resumes the run, or reports that it is complete. To repeat a run with
other settings, give the args.json of one of its model folders and the flags that change:

    python run_pretraining.py --config OUT/small/step0000100/args.json --job_name faster --lr 2e-3
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import argparse

from pcfg.common.cli import run_main
from pretraining.evaluation.loss import gap_meter
from pretraining.training import arguments as command_line
from pretraining.training.pretrain import finished_model, pretrain


def build_parser() -> argparse.ArgumentParser:
    return command_line.build_parser(__doc__)


def main(arguments: list[str] | None = None) -> None:
    options = command_line.parse_with_config(build_parser(), arguments)
    command_line.check(options)
    finished = options.resume == "auto" and finished_model(options)
    if finished:
        print(f"complete: {finished}")
        return
    pretrain(options, gap_meter)


if __name__ == "__main__":
    run_main(main, ranks=True, memory="--train_micro_batch_size_per_gpu")
