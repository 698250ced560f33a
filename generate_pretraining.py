r"""Pre-training text in shards, from a grammar or from another --source.

    python generate_pretraining.py --rule-path rule_deep_mlm.txt --save-path pcfg_dataset

This writes 200 million sentences, 16 GB. A version that a laptop finishes in seconds:

    python generate_pretraining.py --rule-path rule_mini_mlm.txt --save-path mini \
        --sentence-num 100000 --shard-num 4 --test-shard-num 1

Other sources have their own flags: `python generate_pretraining.py --source opt --help`.

Files in --save-path: training{i}.txt and test{i}.txt (one sentence per line, an empty line between two), vocab.txt (special
tokens, then the grammar's words) and manifest_pretraining.json. A shard is a function of the grammar, the seed, the length
limit, its kind and its number. A rerun skips complete shards. It gives the same bytes after any crash and with any number of
workers: threads of this machine, or tasks of a Ray cluster (--executor ray).
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import importlib

from pcfg.common.cli import Parser, run_main

# By --source the modules, with `add_arguments(parser)` and `generate(options)`; their libraries are imported on demand.
SOURCES = {
    "pcfg": "pretraining.sources.grammar",
    "opt": "pretraining.sources.opt.source",
    "corpus": "pretraining.sources.corpus.source",
}


def build_parser(source: str = "pcfg") -> argparse.ArgumentParser:
    """The command line of one source; `--help` lists its own flags only."""
    parser = Parser(description=__doc__)
    _add_source(parser)
    importlib.import_module(SOURCES[source]).add_arguments(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", choices=SOURCES, default="pcfg", help="where the text comes from; default pcfg")


def main(arguments: list[str] | None = None) -> None:
    first = Parser(add_help=False, allow_abbrev=False)
    _add_source(first)
    source = first.parse_known_args(arguments)[0].source
    importlib.import_module(SOURCES[source]).generate(build_parser(source).parse_args(arguments))


if __name__ == "__main__":
    run_main(main)
