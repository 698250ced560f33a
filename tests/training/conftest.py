import shlex

import pytest
import torch
import torch.nn.functional as F

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


@pytest.fixture(scope="session")
def naive_loss():
    """Mean of -log f over the masks of some samples, from one batch padded to the full length and logits at every position."""

    def compute(model, samples, rows):
        hidden = model.encode(torch.from_numpy(samples.input_ids[rows]).long(), torch.from_numpy(samples.input_mask[rows]))
        logits = model.predict(hidden)
        labels = torch.full(logits.shape[:2], -100)
        for i, row in enumerate(rows):
            for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True):
                if position:
                    labels[i, position] = int(word)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return compute


@pytest.fixture(scope="session")
def relative_error():
    """L2 norm of (weights before - weights after - gradient) over that of the gradient: of a step of SGD with rate 1."""

    def compute(before, after):
        after = dict(after.named_parameters())
        wrong = sum((old - after[name] - old.grad).double().square().sum() for name, old in before.named_parameters())
        return (wrong / sum(old.grad.double().square().sum() for old in before.parameters())).sqrt().item()

    return compute
