"""The sizes of the experiments: languages, models, training and measurements of each `--scale`.

All of it was fixed before any accuracy was seen, the weights of the adversarial term too. The thresholds of the same loss are
those of `pretraining.report.same_loss`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; feed-forward layers are four times as wide as the hidden vector."""

    hidden_size: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of all experiments.

    Attributes:
        name: of `--scale`.
        rules: the grammar.
        length_limit: one more than the maximum number of words in a sentence.
        shards, sentences: number of text shards, and of sentences per shard; `test_sentences` of the test shard.
        labelled, validation: rows of a downstream task.
        sizes: shapes by name, from small to large; the width of the largest is a multiple of each.
        base: the size of `steps` and `algorithms`.
        batch, micro_batch: sentences per step, and the maximum per forward pass.
        dropout: of pre-training.
        lr, warmup, half_life: of AdamW: the highest rate, the steps to it, and the steps in which it halves from there.
        sgd_lr, sgd_warmup: of SGD, which starts from AdamW's models at `steps`: the rate, constant after so many steps.
        steps: of all runs except those of the experiment `steps`; `checkpoints`: the steps at which those are saved, `steps`
            among them.
        weights: of the adversarial term that are tried, with `adversarial_batch` labelled sentences per step and that `ridge`.
        selection_seed: of the models that the weight is chosen on.
        trace_sentences: of a trace.
        probe, finetune: flags of run_lp.py and run_ft.py.
        finetune_tasks: of A, B and C; fine-tuning is the most expensive measurement.
        precision: flags of run_pretraining.py.
    """

    name: str
    rules: str
    length_limit: int
    shards: int
    sentences: int
    test_sentences: int
    labelled: int
    validation: int
    sizes: dict[str, Size]
    base: str
    batch: int
    micro_batch: int
    dropout: float
    lr: float
    warmup: int
    half_life: int
    sgd_lr: float
    sgd_warmup: int
    steps: int
    checkpoints: tuple[int, ...]
    weights: tuple[float, ...]
    ridge: float
    adversarial_batch: int
    selection_seed: int
    trace_sentences: int
    probe: tuple[str, ...]
    finetune: tuple[str, ...]
    finetune_tasks: tuple[str, ...]
    precision: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Most tokens of a sample: [CLS], the words, [SEP]."""
        return self.length_limit - 1 + 2

    @property
    def largest(self) -> str:
        return max(self.sizes, key=lambda name: self.sizes[name].hidden_size)


# The README's recipes of probes and fine-tuning, for about a thousand labelled sentences.
PROBE = tuple(
    "--per_device_train_batch_size 512 --per_device_eval_batch_size 512 --num_train_epochs 50 --warmup_steps 20 "
    "--learning_rate 1e-3 --seeds 0,1,2".split()
)
FINETUNE = tuple(
    "--per_device_train_batch_size 128 --per_device_eval_batch_size 128 --gradient_accumulation_steps 1 --num_train_epochs 15 "
    "--warmup_steps 20 --learning_rate 1e-4".split()
)

MINI = Scale(
    name="mini",
    rules="rule_mini_mlm.txt",
    length_limit=9,
    shards=10,
    sentences=100_000,
    test_sentences=2000,
    labelled=1000,
    validation=5000,
    sizes={"small": Size(32, 3, 2), "medium": Size(64, 3, 4), "large": Size(128, 3, 8)},
    base="medium",
    batch=128,
    micro_batch=128,
    dropout=0.0,
    lr=3e-3,
    warmup=180,
    half_life=1000,
    sgd_lr=5e-4,
    sgd_warmup=360,
    steps=3000,
    checkpoints=(1500, 3000, 4500, 6000),
    weights=(0.01, 0.03, 0.1, 0.3),
    ridge=1.0,
    adversarial_batch=128,
    selection_seed=100,
    trace_sentences=2000,
    probe=PROBE,
    finetune=FINETUNE,
    finetune_tasks=("B",),
    precision=(),
)

SMALL = Scale(
    name="small",
    rules="rule_deep_mlm.txt",
    length_limit=17,
    shards=20,
    sentences=1_000_000,
    test_sentences=5000,
    labelled=10_000,
    validation=10_000,
    sizes={"small": Size(128, 6, 2), "medium": Size(256, 6, 4), "large": Size(512, 6, 8)},
    base="medium",
    batch=1024,
    micro_batch=1024,
    dropout=0.0,
    lr=1e-3,
    warmup=600,
    half_life=2500,
    sgd_lr=5e-4,
    sgd_warmup=600,
    steps=5000,
    checkpoints=(2500, 5000, 7500, 10_000),
    weights=(0.01, 0.03, 0.1, 0.3),
    ridge=1.0,
    adversarial_batch=512,
    selection_seed=100,
    trace_sentences=5000,
    probe=PROBE,
    finetune=FINETUNE,
    finetune_tasks=("A", "B", "C"),
    precision=("--bf16",),
)

# Liu et al. 2023, appendix A: batches of 4096, over 30,000 steps, AdamW at 1e-3 with 6% warmup, SGD with 12% and a constant
# rate of 1e-3; probes by AdamW at 1e-3 in 100 epochs, fine-tuning by AdamW at 1e-4 with 200 warmup steps in 10 epochs. Widths
# are divisors of the largest, so that all sizes have a place in its parameters. Their grammar is not published, this one has
# its shape; AdamW's half-life is ours, since the paper does not say how its rate changes after the warmup.
PAPER = Scale(
    name="paper",
    rules="rule_deeper_mlm.txt",
    length_limit=33,
    shards=20,
    sentences=1_000_000,
    test_sentences=10_000,
    labelled=10_000,
    validation=10_000,
    sizes={
        "2M": Size(192, 4, 3),
        "21M": Size(384, 12, 6),
        "113M": Size(768, 16, 12),
        "730M": Size(1536, 26, 24),
    },
    base="113M",
    batch=4096,
    micro_batch=512,
    dropout=0.1,
    lr=1e-3,
    warmup=1800,
    half_life=15_000,
    sgd_lr=1e-3,
    sgd_warmup=2400,
    steps=30_000,
    checkpoints=(20_000, 30_000, 40_000, 50_000),
    weights=(0.001, 0.003, 0.01, 0.03, 0.1),
    ridge=1e-3,
    adversarial_batch=512,
    selection_seed=100,
    trace_sentences=10_000,
    probe=tuple(
        "--per_device_train_batch_size 512 --per_device_eval_batch_size 512 --num_train_epochs 100 --warmup_steps 50 "
        "--learning_rate 1e-3 --seeds 0,1,2,3,4".split()
    ),
    finetune=tuple(
        "--per_device_train_batch_size 128 --per_device_eval_batch_size 512 --gradient_accumulation_steps 1 "
        "--num_train_epochs 10 --warmup_steps 200 --learning_rate 1e-4 --seeds 0,1,2,3,4".split()
    ),
    finetune_tasks=("A", "B", "C"),
    precision=("--bf16",),
)

SCALES = {scale.name: scale for scale in (MINI, SMALL, PAPER)}
