"""Small local stand-ins for data of the hub, to try each kind of data without a network.

    python -m pretraining.sources.examples openwebtext FOLDER     documents, one per row (parquet, column text)
    python -m pretraining.sources.examples bookcorpus FOLDER      sentences, one per row, lower-cased (parquet, column text)
    python -m pretraining.sources.examples opt FOLDER             a tiny OPT with random weights, and its tokenizer
    python -m pretraining.sources.examples sst2 FOLDER            labelled sentences in GLUE's columns: do they contain "the"?
    python -m pretraining.sources.examples qnli FOLDER            labelled pairs in GLUE's columns: is it the next sentence?

The text is the docstrings of Python's standard library. The layouts are those of the hub's data sets Skylion007/openwebtext
and bookcorpus, and of facebook/opt-125m.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import ast
import csv
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pcfg.common.cli import Parser, positive_int, run_main
from pcfg.common.files import InputError, atomic_folder

OPT_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # with OPT's ids; OPT begins and ends a text with </s>
OPT_TOKENS = 600


def documents(number: int) -> list[str]:
    """The docstrings of `number` modules of the standard library, one document per module, in the order of their names."""

    def text(path: Path) -> str:
        nodes = ast.walk(ast.parse(path.read_bytes()))
        documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        return "\n\n".join(docstring for node in documented if (docstring := ast.get_docstring(node)))

    texts = map(text, sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    return list(itertools.islice(filter(None, texts), number))


def _sentences(number: int) -> Iterator[list[str]]:
    """The sentences of `documents`, as lower-case words."""
    from nltk.tokenize import NLTKWordTokenizer
    from sentencex import segment

    split = NLTKWordTokenizer().tokenize
    for document in documents(number):
        for sentence in segment("en", " ".join(document.split())):
            yield split(sentence.lower())


def _write_parquet(folder: Path, rows: list[str]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "train-00000-of-00001.parquet")


def _short_sentences(number: int) -> list[str]:
    """Those of at most ten words."""
    return [" ".join(words) for words in _sentences(number) if len(words) <= 10]


def _write_labelled(folder: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    """Every fourth row in validation.csv, the others in train.csv."""
    for name, part in (("train", [row for i, row in enumerate(rows) if i % 4]), ("validation", rows[::4])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*columns, "label"))
            writer.writerows(part)


def write_sst2(folder: Path, number: int) -> None:
    _write_labelled(folder, ("sentence",), [(text, int("the" in text.split())) for text in _short_sentences(number)])


def write_qnli(folder: Path, number: int) -> None:
    """A sentence with the next one (label 0, entailment) or the one after that (label 1)."""
    texts = _short_sentences(number)
    # Four pairs in a row have one label, so that both labels are among every fourth pair.
    pairs = [(3 * pair, pair // 4 % 2) for pair in range(len(texts) // 3)]
    _write_labelled(folder, ("question", "sentence"), [(texts[i], texts[i + 1 + label], label) for i, label in pairs])


def write_opt(folder: Path, number: int) -> None:
    """An OPT of two layers with random weights (seed 0), and a byte-level BPE tokenizer trained on `number` documents."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents(number), OPT_TOKENS, special_tokens=list(OPT_SPECIAL_TOKENS), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "ffn_dim": 64}
    # init_std is large, so that the distributions are far from uniform.
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, init_std=0.3, **sizes)
    OPTForCausalLM(config).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "openwebtext": lambda folder, number: _write_parquet(folder, documents(number)),
    "bookcorpus": lambda folder, number: _write_parquet(folder, [" ".join(words) for words in _sentences(number)]),
    "opt": write_opt,
    "sst2": write_sst2,
    "qnli": write_qnli,
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.sources.examples", description=__doc__)
    parser.add_argument("kind", choices=WRITERS, help="kind of data")
    parser.add_argument("folder", type=Path, help="output folder; must not exist")
    parser.add_argument("--documents", type=positive_int, default=100, help="number of modules with docstrings; default 100")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if options.folder.exists():
        raise InputError(f"{options.folder}: exists already; give another folder, or remove it")
    with atomic_folder(options.folder) as folder:
        WRITERS[options.kind](folder, options.documents)
    print(f"{options.folder}: {options.kind}, small and local")


if __name__ == "__main__":
    run_main(main)
