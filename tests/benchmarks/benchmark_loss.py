"""Speed of the exact loss, beside the released way, one sentence a forward pass, measured in the same run.

    bash scripts/benchmark.sh loss

A version of some seconds, with rough numbers:

    bash scripts/benchmark.sh loss --scale 0.02 --only mini

Rates are sentences a second of the clock with everything on --cores cores. The models have random weights and the shapes of
scripts/quickstart.sh's. The baseline is transformers' own code on sentences padded to 32 tokens (10 on the mini grammar); it is
timed on few sentences, taken at equal steps of the list sorted by length, with one thread and with as many as cores, of
which the faster counts.
"""

import dataclasses
import tempfile
import time
from functools import partial

import numpy as np
import torch
from measure import Row, cpu_seconds, measure_settings, number_text
from naive_loss import SentenceBySentence
from transformers import AutoModelForMaskedLM

from pcfg.common.cli import run_main
from pcfg.common.files import keyed_rng
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pcfg.sampler import Sampler
from pretraining.data.contexts import from_texts
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.evaluation.loss import context_losses
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, save_model
from pretraining.model.config import ModelConfig
from tests.bert_tokenizer import build_tokenizer

GOAL = 20
BERT_SIZE = 30_522  # entries of BERT's uncased vocabulary
UNIT = "sentences/s on {} cores"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A language and a model of it.

    Attributes:
        what: the row's name.
        rules: a shipped grammar.
        shape: hidden size, layers, heads.
        length: tokens that the baseline pads to, positions of the model.
        entries: of the vocabulary; None for the grammar's words and the special tokens alone.
        sentences, baseline: how many each side is timed on, at --scale 1.
    """

    what: str
    rules: str
    shape: tuple[int, int, int]
    length: int
    entries: int | None = None
    sentences: int = 1000
    baseline: int = 60


SETTINGS = {
    "mini": Setting("mini grammar, 64 wide, 3 layers", "rule_mini_mlm.txt", (64, 3, 4), 10, None, 4000, 200),
    "deep": Setting("deep grammar, 128 wide, 3 layers", "rule_deep_mlm.txt", (128, 3, 8), 32),
    "bert": Setting("deep grammar, 128 wide, 3 layers", "rule_deep_mlm.txt", (128, 3, 8), 32, BERT_SIZE, 1000, 30),
}


def make_model(folder, setting: Setting, vocabulary: Vocabulary):
    """A random model, ours and transformers'."""
    width, layers, heads = setting.shape
    torch.manual_seed(0)
    config = ModelConfig(vocabulary.size, width, layers, heads, 4 * width, max_position_embeddings=setting.length)
    save_model(folder, MaskedLM(config), build_tokenizer(vocabulary, True, setting.length), vocabulary, {})
    return load_model(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()


def timed(work) -> tuple[float, float]:
    """Seconds of the clock and of the processor that work() takes."""
    start, start_cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - start, cpu_seconds() - start_cpu


def measure(setting: Setting, scale: float, cores: int) -> Row:
    grammar = Grammar.read(find_rules(setting.rules))
    amount, few = (max(4, round(number * scale)) for number in (setting.sentences, setting.baseline))
    tokens, lengths = Sampler(grammar, setting.length - 2).sample(amount, keyed_rng(0, "benchmark-loss"))
    texts = [" ".join(grammar.words[word] for word in row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    fillers = (setting.entries or 0) - len(SPECIAL_TOKENS) - len(grammar.words)
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *grammar.words, *(f"filler{number}" for number in range(fillers))])
    table, contexts = LookupTable.compute(grammar, texts, "benchmark"), from_texts(texts, vocabulary, "benchmark")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = make_model(folder, setting, vocabulary)
    few = min(few, amount)
    chosen = np.argsort(lengths, kind="stable")[((np.arange(few) + 0.5) * amount / few).astype(int)]
    conditionals = [table.conditionals(row, row + 1) for row in chosen]
    found: dict = {}

    def naive(max_length, threads):
        torch.set_num_threads(threads)
        loss = SentenceBySentence(theirs, vocabulary.ids, table.words, max_length)
        found["naive"] = [loss.losses(texts[row], rows) for row, rows in zip(chosen, conditionals, strict=True)]

    def engine():
        found["gap"] = context_losses(ours, contexts, table, columns)[1]

    context_losses(ours, from_texts(texts[:2], vocabulary, "benchmark"))  # what a first call loads
    seconds, cpu = timed(engine)
    # Small operations on several threads may be slower than on one: the baseline's better choice counts.
    baseline, baseline_cpu = min(timed(partial(naive, setting.length, threads)) for threads in {1, cores})
    unpadded, _ = min(timed(partial(naive, None, threads)) for threads in {1, cores})
    torch.set_num_threads(cores)
    exact = found["gap"] + table.entropy
    offsets = contexts.offsets
    difference = np.mean([np.mean(exact[offsets[row] : offsets[row + 1]]) for row in chosen]) - np.mean(
        [np.mean(losses) for losses in found["naive"]]
    )
    rate, cpu_ratio = amount / seconds, (baseline_cpu / few) / (cpu / amount)
    note = (
        f"{amount:,} sentences, {len(contexts.label):,} contexts; baseline on {few:,}; a CPU-second, the ratio is "
        f"{number_text(cpu_ratio)}; without padding the baseline makes {number_text(few / unpadded)}, a ratio of "
        f"{number_text(rate * unpadded / few)}; the mean losses differ by {abs(difference):.1e} nats"
    )
    return Row(
        f"exact loss, {setting.what}, {vocabulary.size:,} entries", rate, UNIT.format(cores), few / baseline, None, GOAL, note
    )


def main(arguments: list[str] | None = None) -> None:
    measure_settings("loss", __doc__, SETTINGS, measure, arguments)


if __name__ == "__main__":
    run_main(main)
