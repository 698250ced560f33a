"""The sizes of the experiments: languages, models, training and measurements of each `--scale`, from scales.toml.

The thresholds of the same loss are those of `pretraining.report.same_loss`.
"""

import dataclasses
import tomllib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; feed-forward layers are four times as wide as the hidden vector."""

    hidden_size: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of all experiments."""

    name: str
    rules: str
    length_limit: int  # one more than the maximum number of words in a sentence
    shards: int  # of training text
    sentences: int  # per training shard
    test_sentences: int  # of the test shard
    labelled: int  # training rows of a downstream task
    validation: int  # validation rows of a downstream task
    # sizes: shapes by name, from small to large; the width of the largest is a multiple of each
    sizes: dict[str, Size]
    base: str  # the size of `steps` and `algorithms`
    batch: int  # sentences per step
    micro_batch: int  # maximum number of sentences per forward pass
    dropout: float  # of pre-training
    lr: float  # AdamW's highest rate
    warmup: int  # AdamW's steps to it
    half_life: int  # steps in which AdamW's rate halves from there
    sgd_lr: float  # of SGD, which starts from AdamW's models at `steps`
    sgd_warmup: int  # steps after which SGD's rate is constant
    steps: int  # of all runs except those of the experiment `steps`
    checkpoints: tuple[int, ...]  # steps at which those are saved, `steps` among them
    weights: tuple[float, ...]  # of the adversarial term, to choose from
    ridge: float  # of the adversarial term
    adversarial_batch: int  # labelled sentences per step of the adversarial term
    selection_seed: int  # of the models that the weight is chosen on
    trace_sentences: int  # of a trace
    probe: tuple[str, ...]  # flags of run_lp.py
    finetune: tuple[str, ...]  # flags of run_ft.py
    finetune_tasks: tuple[str, ...]  # fine-tuning is the most expensive measurement
    precision: tuple[str, ...]  # flags of run_pretraining.py

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a sample: [CLS], the words, [SEP]."""
        return self.length_limit - 1 + 2

    @property
    def largest(self) -> str:
        return max(self.sizes, key=lambda name: self.sizes[name].hidden_size)


def _read_scales() -> dict[str, Scale]:
    scales = {}
    for name, fields in tomllib.loads(Path(__file__).with_name("scales.toml").read_text(encoding="utf-8")).items():
        fields["sizes"] = {size: Size(**shape) for size, shape in fields["sizes"].items()}
        for flags in ("probe", "finetune", "precision"):
            fields[flags] = fields[flags].split()
        lists = {field: tuple(value) for field, value in fields.items() if isinstance(value, list)}
        scales[name] = Scale(name=name, **(fields | lists))
    return scales


SCALES = _read_scales()
MINI = SCALES["mini"]
