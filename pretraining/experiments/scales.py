"""The sizes of the experiments: languages, models, training and measurements of each `--scale`.

All of it was fixed before any accuracy was seen, the weights of the adversarial term too. The thresholds of the same loss are
those of `pretraining.report.same_loss`.
"""

import dataclasses

# The README's recipes of probes and fine-tuning, for about a thousand labelled sentences.
PROBE = tuple(
    "--per_device_train_batch_size 512 --per_device_eval_batch_size 512 --num_train_epochs 50 --warmup_steps 20 "
    "--learning_rate 1e-3 --seeds 0,1,2".split()
)
FINETUNE = tuple(
    "--per_device_train_batch_size 128 --per_device_eval_batch_size 128 --gradient_accumulation_steps 1 --num_train_epochs 15 "
    "--warmup_steps 20 --learning_rate 1e-4".split()
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; feed-forward layers are four times as wide as the hidden vector."""

    hidden_size: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of all experiments; the defaults are those of `--scale small`."""

    name: str = "small"
    rules: str = "rule_deep_mlm.txt"
    length_limit: int = 17  # one more than the maximum number of words in a sentence
    shards: int = 20  # of training text
    sentences: int = 1_000_000  # per training shard
    test_sentences: int = 5000  # of the test shard
    labelled: int = 10_000  # training rows of a downstream task
    validation: int = 10_000  # validation rows of a downstream task
    # sizes: shapes by name, from small to large; the width of the largest is a multiple of each
    sizes: dict[str, Size] = dataclasses.field(
        default_factory=lambda: {"small": Size(128, 6, 2), "medium": Size(256, 6, 4), "large": Size(512, 6, 8)}
    )
    base: str = "medium"  # the size of `steps` and `algorithms`
    batch: int = 1024  # sentences per step
    micro_batch: int = 1024  # maximum number of sentences per forward pass
    dropout: float = 0.0  # of pre-training
    lr: float = 1e-3  # AdamW's highest rate
    warmup: int = 600  # AdamW's steps to it
    half_life: int = 2500  # steps in which AdamW's rate halves from there
    sgd_lr: float = 5e-4  # of SGD, which starts from AdamW's models at `steps`
    sgd_warmup: int = 600  # steps after which SGD's rate is constant
    steps: int = 5000  # of all runs except those of the experiment `steps`
    checkpoints: tuple[int, ...] = (2500, 5000, 7500, 10_000)  # steps at which those are saved, `steps` among them
    weights: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # of the adversarial term, to choose from
    ridge: float = 1.0  # of the adversarial term
    adversarial_batch: int = 512  # labelled sentences per step of the adversarial term
    selection_seed: int = 100  # of the models that the weight is chosen on
    trace_sentences: int = 5000  # of a trace
    probe: tuple[str, ...] = PROBE  # flags of run_lp.py
    finetune: tuple[str, ...] = FINETUNE  # flags of run_ft.py
    finetune_tasks: tuple[str, ...] = ("A", "B", "C")  # fine-tuning is the most expensive measurement
    precision: tuple[str, ...] = ("--bf16",)  # flags of run_pretraining.py

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a sample: [CLS], the words, [SEP]."""
        return self.length_limit - 1 + 2

    @property
    def largest(self) -> str:
        return max(self.sizes, key=lambda name: self.sizes[name].hidden_size)


SMALL = Scale()

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
    batch=128,
    micro_batch=128,
    lr=3e-3,
    warmup=180,
    half_life=1000,
    sgd_warmup=360,
    steps=3000,
    checkpoints=(1500, 3000, 4500, 6000),
    adversarial_batch=128,
    trace_sentences=2000,
    finetune_tasks=("B",),
    precision=(),
)

# Liu et al. 2023, appendix A: batches of 4096, over 30,000 steps, AdamW at 1e-3 with 6% warmup, SGD with 12% and a constant
# rate of 1e-3; probes by AdamW at 1e-3 in 100 epochs, fine-tuning by AdamW at 1e-4 with 200 warmup steps in 10 epochs. Widths
# are divisors of the largest, so that all sizes have a place in its parameters. Their grammar is not published, this one has
# its shape; AdamW's half-life is ours, since the paper does not say how its rate changes after the warmup.
PAPER = Scale(
    name="paper",
    rules="rule_deeper_mlm.txt",
    length_limit=33,
    test_sentences=10_000,
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
    warmup=1800,
    half_life=15_000,
    sgd_lr=1e-3,
    sgd_warmup=2400,
    steps=30_000,
    checkpoints=(20_000, 30_000, 40_000, 50_000),
    weights=(0.001, 0.003, 0.01, 0.03, 0.1),
    ridge=1e-3,
    trace_sentences=10_000,
    probe=tuple(
        "--per_device_train_batch_size 512 --per_device_eval_batch_size 512 --num_train_epochs 100 --warmup_steps 50 "
        "--learning_rate 1e-3 --seeds 0,1,2,3,4".split()
    ),
    finetune=tuple(
        "--per_device_train_batch_size 128 --per_device_eval_batch_size 512 --gradient_accumulation_steps 1 "
        "--num_train_epochs 10 --warmup_steps 200 --learning_rate 1e-4 --seeds 0,1,2,3,4".split()
    ),
)

SCALES = {scale.name: scale for scale in (MINI, SMALL, PAPER)}
