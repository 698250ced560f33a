import shlex

import pytest

SMALL = (
    "--tokenizer_name bert-large-uncased --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 "
    "--intermediate_size 32 --lr 5e-3 --train_batch_size 32 --train_micro_batch_size_per_gpu 8 --lr_schedule step "
    "--max_steps 8 --print_steps 1"
)


@pytest.fixture
def train(tiny_samples, tmp_path):
    """Runs the pre-training of a small model in this process; returns its final model folder."""
    from pretraining.training import arguments as command_line
    from pretraining.training.pretrain import pretrain

    def run(flags="", job="job", data=tiny_samples, **keywords):
        fixed = ["--dataset_path", str(data), "--output_dir", str(tmp_path), "--job_name", job]
        parser = command_line.build_parser("")
        options = parser.parse_args([*fixed, *shlex.split(SMALL), *shlex.split(flags)])
        command_line.check(options)
        return pretrain(options, **keywords)

    return run
