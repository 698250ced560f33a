"""Speed of the exact loss against the released method (one sentence per forward pass), measured in one run.

    bash scripts/benchmark.sh loss

In some seconds, with rough numbers:

    bash scripts/benchmark.sh loss --scale 0.02 --only mini

Rates are sentences per second of wall time on --cores cores. The models have random weights, and the shapes of models on the
mini grammar. The baseline is the code of transformers on sentences padded to 32 tokens (10 on the mini grammar). It is
timed on few sentences, at equal steps of the list sorted by length. The faster of one thread and --cores threads counts.
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
from pretraining.evaluation.inputs import Truth
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
    """A language and a model of it."""

    what: str  # name of the row
    rules: str  # a shipped grammar
    shape: tuple[int, int, int]  # hidden size, layers, heads
    length: int  # padded length of the baseline, positions of the model
    entries: int | None = None  # of the vocabulary; None for the words of the grammar and the special tokens
    sentences: int = 1000  # timed at --scale 1
    baseline: int = 60  # sentences for the baseline


SETTINGS = {
    "mini": Setting("mini grammar, 64 wide, 3 layers", "rule_mini_mlm.txt", (64, 3, 4), 10, None, 4000, 200),
    "deep": Setting("deep grammar, 128 wide, 3 layers", "rule_deep_mlm.txt", (128, 3, 8), 32),
    "bert": Setting("deep grammar, 128 wide, 3 layers", "rule_deep_mlm.txt", (128, 3, 8), 32, BERT_SIZE, 1000, 30),
}


def make_model(folder, setting: Setting, vocabulary: Vocabulary):
    """A random model, as ours and as one of transformers."""
    width, layers, heads = setting.shape
    torch.manual_seed(0)
    config = ModelConfig(vocabulary.size, width, layers, heads, 4 * width, max_position_embeddings=setting.length)
    save_model(folder, MaskedLM(config), build_tokenizer(vocabulary, True, setting.length), vocabulary, {})
    return load_model(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()


def timed(work) -> tuple[float, float]:
    """Wall and CPU seconds of work()."""
    start = time.perf_counter()
    start_cpu = cpu_seconds()
    work()
    return time.perf_counter() - start, cpu_seconds() - start_cpu


def measure(setting: Setting, scale: float, cores: int) -> Row:
    grammar = Grammar.read(find_rules(setting.rules))
    amount, few = (max(4, round(number * scale)) for number in (setting.sentences, setting.baseline))
    tokens, lengths = Sampler(grammar, setting.length - 2).sample(amount, keyed_rng(0, "benchmark-loss"))
    texts = [" ".join(grammar.words[word] for word in row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    fillers = (setting.entries or 0) - len(SPECIAL_TOKENS) - len(grammar.words)
    vocabulary = Vocabulary([*SPECIAL_TOKENS, *grammar.words, *(f"filler{number}" for number in range(fillers))])
    table = LookupTable.compute(grammar, texts, "benchmark")
    contexts = from_texts(texts, vocabulary, "benchmark")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = make_model(folder, setting, vocabulary)
    few = min(few, amount)
    sample = np.argsort(lengths, kind="stable")[((np.arange(few) + 0.5) * amount / few).astype(int)]
    conditionals = [table.conditionals(row, row + 1) for row in sample]
    results: dict = {}

    def naive(max_length, threads):
        torch.set_num_threads(threads)
        loss = SentenceBySentence(theirs, vocabulary.ids, table.words, max_length)
        results["naive"] = [loss.losses(texts[row], rows) for row, rows in zip(sample, conditionals, strict=True)]

    def engine():
        results["gap"] = context_losses(ours, contexts, Truth(table, columns))[1]

    context_losses(ours, from_texts(texts[:2], vocabulary, "benchmark"))  # the first call loads libraries
    seconds, cpu = timed(engine)
    # Small operations may be slower on several threads: the better choice of the baseline counts.
    baseline, baseline_cpu = min(timed(partial(naive, setting.length, threads)) for threads in {1, cores})
    unpadded, _ = min(timed(partial(naive, None, threads)) for threads in {1, cores})
    torch.set_num_threads(cores)
    exact = results["gap"] + table.entropy
    offsets = contexts.offsets
    difference = np.mean([np.mean(exact[offsets[row] : offsets[row + 1]]) for row in sample]) - np.mean(
        [np.mean(losses) for losses in results["naive"]]
    )
    rate = amount / seconds
    cpu_ratio = (baseline_cpu / few) / (cpu / amount)
    note = (
        f"{amount:,} sentences, {len(contexts.label):,} contexts; baseline on {few:,}; per CPU-second, the ratio is "
        f"{number_text(cpu_ratio)}; without padding the baseline reaches {number_text(few / unpadded)}, a ratio of "
        f"{number_text(rate * unpadded / few)}; the mean losses differ by {abs(difference):.1e} nats"
    )
    return Row(
        f"exact loss, {setting.what}, {vocabulary.size:,} entries", rate, UNIT.format(cores), few / baseline, None, GOAL, note
    )


def main(arguments: list[str] | None = None) -> None:
    measure_settings("loss", __doc__, SETTINGS, measure, arguments)


if __name__ == "__main__":
    run_main(main)
