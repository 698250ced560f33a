"""Speed from natural text to masked samples, compared with loops over transformers' BertTokenizer in the same run.

    bash scripts/benchmark.sh corpus

A version of some seconds, with rough numbers:

    bash scripts/benchmark.sh corpus --scale 0.02

The text is English that comes with Python: the documentation strings of its own library and of the installed packages, each
once, one document per file, cut into sentences at full stops. It is cut into shards without a common document. For more text
the same shards are repeated, which is no advantage, since each shard is encoded without memory of others. Baselines read,
tokenise one sentence per call, pack, mask with `random` and write HDF5, on one core.
"""

import argparse
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row, add_arguments, cpu_seconds, machine, number_text, report, run_script, use_cores
from naive import packed_documents, write_masked
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from pcfg.common.cli import Parser, run_main
from pcfg.common.text import shard_name
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary

SCRIPT = Path(__file__).parents[2] / "generate_samples.py"
GOAL_RATIO, GOAL_SECONDS = 10, 600  # against the loop; for 1 GB on 2 cores
MASKS = {"max_tokens": 512, "max_masks": 77, "masked_share": 0.15}
SHARD_BYTES = 8_000_000
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)


def documents() -> Iterator[str]:
    """The documentation strings of each file, each once, one sentence per line."""
    paths = sysconfig.get_paths()
    seen: set[str] = set()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sorted(Path(root).rglob("*.py")):
            texts = (" ".join(text.split()) for text in DOCSTRING.findall(path.read_text(errors="ignore")))
            new = [text for text in dict.fromkeys(texts) if len(text) > 60 and text not in seen]
            seen.update(new)
            if new:
                yield "\n".join(re.sub(r"(?<=[.?!]) (?=[A-Z])", "\n", text) for text in new)


def write_text(folder: Path, size: int) -> tuple[int, int]:
    """Write shards of `size` bytes together; returns their bytes, and the bytes without repetition."""
    shards: list[str] = []
    shard: list[str] = []
    length = 0
    once = 0
    for document in documents():
        shard.append(document)
        length += len(document.encode()) + 2
        if length >= min(SHARD_BYTES, size):
            shards.append("\n\n".join(shard) + "\n")
            once += length
            shard = []
            length = 0
            if once >= size:
                break
    folder.mkdir()
    written = 0
    number = 0
    while written < size:
        content = shards[number % len(shards)].encode()
        (folder / shard_name("training", number)).write_bytes(content)
        written += len(content)
        number += 1
    return written, min(once, written)


def write_vocabulary(folder: Path) -> None:
    """A vocabulary of WordPieces as large as BERT's, or nearly, trained on the first shard."""
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train([str(folder / "training0.txt")], vocab_size=30_522, special_tokens=list(SPECIAL_TOKENS))
    Vocabulary(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)).write(folder / "vocab.txt")


def naive_rate(text: Path, tokenizer: Any, size: int, target: Path) -> float:
    """MB per CPU-second of the loop, on the first `size` bytes of a text."""
    content = text.read_bytes()[:size]
    lines = content.decode(errors="ignore").split("\n")
    random.seed(0)
    start = cpu_seconds()
    write_masked(target, packed_documents(lines, tokenizer, MASKS["max_tokens"]), tokenizer, **MASKS)
    return len(content) / 1e6 / (cpu_seconds() - start)


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    text = folder / "text"
    written, once = write_text(text, round(options.megabytes * 1e6 * options.scale))
    if options.vocab_file is None:
        write_vocabulary(text)
    vocabulary = options.vocab_file or text / "vocab.txt"
    start = cpu_seconds()
    clock = time.monotonic()
    command = ["--dir", text, "-o", folder / "samples", "--vocab_file", vocabulary.absolute(), "--text", "documents"]
    run_script(SCRIPT, *command, "--max_seq_length", MASKS["max_tokens"], "--n_processes", options.cores)
    seconds = time.monotonic() - clock
    rate = written / 1e6 / (cpu_seconds() - start)

    entries = Vocabulary.read(vocabulary)
    first = text / "training0.txt"
    size = round(2e6 * options.scale)
    fast = naive_rate(first, BertTokenizer(vocab=entries.ids), size, folder / "fast.hdf5")
    slow = naive_rate(first, BertTokenizerLegacy(vocab_file=str(vocabulary)), size, folder / "slow.hdf5")
    gigabyte = seconds * 1e9 / written
    note = (
        f"{written / 1e6:,.0f} MB, {once / 1e6:,.0f} of them without repetition, {entries.size:,} entries, start-up included; "
        f"baselines on {size / 1e6:g} MB"
    )
    unit = "MB/CPU-s"
    return [
        Row("text to samples; loop over BertTokenizer (in Rust)", rate, unit, fast, None, GOAL_RATIO, note),
        Row("text to samples; loop over BertTokenizerLegacy (in Python)", rate, unit, slow, None, GOAL_RATIO),
        Row(
            f"1 GB of text, on {options.cores} cores",
            gigabyte,
            "s",
            goal=GOAL_SECONDS,
            smaller_is_better=True,
            note=f"{number_text(seconds)} s for {written / 1e6:,.0f} MB",
        ),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bash scripts/benchmark.sh corpus", description=__doc__)
    add_arguments(parser, ["samples"])
    parser.add_argument("--megabytes", type=float, default=1000, help="of text, times --scale; default 1000")
    parser.add_argument("--vocab-file", type=Path, help="vocabulary of WordPieces; default: one is trained on the text")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    use_cores(options.cores)
    facts = machine("numpy", "tokenizers", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    report(rows, facts, options.output)


if __name__ == "__main__":
    run_main(main)
