"""Masked samples (HDF5) from text shards, with the tokenizer that they were made with.

    python generate_samples.py --dir pcfg_dataset -o pcfg_dataset/pretraining --dup_factor 5 --vocab_file vocab.txt \\
        --do_lower_case 1 --masked_lm_prob 0.15 --max_seq_length 32 --model_name bert-large-uncased \\
        --max_predictions_per_seq 5 --n_processes 32

On a laptop, with text that generate_pretraining.py made in seconds, and the objective of the paper (one mask per sentence):

    python generate_pretraining.py --rule-path rule_mini_mlm.txt --save-path mini --shard-num 2 --test-shard-num 1 \\
        --sentence-num 10000 --test-sentence-num 1000
    python generate_samples.py --dir mini -o mini/pretraining --vocab_file vocab.txt --max_seq_length 32 --single_mask

Text of a corpus (documents: one sentence per line, an empty line between two documents) is split into WordPieces and packed:

    python generate_samples.py --dir corpus -o corpus/pretraining --vocab_file vocab.txt --max_seq_length 512 --n_processes 2

training{i}.txt becomes train_shard_{k}.hdf5 with k = i * dup_factor + j, test{i}.txt becomes test_shard_{k}.hdf5. The tokenizer
goes into a folder next to them, named after --model_name. A rerun of the same command makes what is missing or damaged.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, folder_name, non_negative_int, positive_int, probability, run_main
from pcfg.common.executors import add_executor_arguments
from pcfg.common.text import TEXT_MANIFEST
from pretraining.data.sample_shards import DOCUMENTS, generate


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--dir", type=Path, required=True, help="folder of training{i}.txt and test{i}.txt")
    files.add_argument("-o", "--output_dir", type=folder_name, required=True, help="folder for the samples and the tokenizer")
    text = (
        "vocabulary, or a model's tokenizer.json of BERT's kind; a bare name is looked up in --dir, then in the working "
        "directory (default: vocab.txt)"
    )
    files.add_argument("--vocab_file", default="vocab.txt", help=text)
    text = (
        "name of the tokenizer's folder in --output_dir; run_pretraining.py finds it by this name as --tokenizer_name "
        "(default: bert-large-uncased)"
    )
    files.add_argument("--model_name", default="bert-large-uncased", help=text)
    files.add_argument("--overwrite", action="store_true", help="replace samples that were made otherwise")

    tokens = parser.add_argument_group("tokens")
    text = (
        "sentences: of a known language, one sample per sentence, one token per word, anything else is an error. documents: "
        "natural text, an empty line between two documents, split into WordPieces; the sentences of a document are packed into "
        f"samples. auto: documents if {TEXT_MANIFEST} in --dir names a corpus as their source (default: auto)"
    )
    tokens.add_argument("--text", choices=("auto", "sentences", DOCUMENTS), default="auto", help=text)
    text = (
        "whether the tokenizer lower-cases; it may not change a word of sentences; no effect on text that came with a "
        "tokenizer of its own (default: 1)"
    )
    tokens.add_argument("--do_lower_case", type=int, choices=(0, 1), default=1, help=text)
    text = (
        "tokens per sample, [CLS], [SEP] and padding included; longer sentences are an error, or split over samples of "
        "documents (default: 32)"
    )
    tokens.add_argument("--max_seq_length", type=positive_int, default=32, help=text)
    text = "of documents: share of samples with room for fewer tokens, a number uniform in 2 .. all (default: 0.1, as BERT)"
    tokens.add_argument("--short_seq_prob", type=probability, help=text)

    masks = parser.add_argument_group("masks")
    text = "sample shards per text shard, with different masks (default: 1)"
    masks.add_argument("--dup_factor", type=positive_int, default=1, help=text)
    text = "share of the tokens that are masked, [CLS] and [SEP] counted (default: 0.15)"
    masks.add_argument("--masked_lm_prob", type=probability, default=0.15, help=text)
    text = "maximum number of masks per sample (default: 5; of documents --masked_lm_prob x --max_seq_length)"
    masks.add_argument("--max_predictions_per_seq", type=positive_int, help=text)
    text = "probability that a masked word becomes [MASK] (default: 0.8)"
    masks.add_argument("--mask_token_prob", type=probability, default=0.8, help=text)
    text = "probability that it becomes a uniformly drawn word; else it stays as it is (default: 0.1)"
    masks.add_argument("--random_token_prob", type=probability, default=0.1, help=text)
    text = "the paper's objective: one mask per sample, always [MASK]; of the options above only --dup_factor has an effect"
    masks.add_argument("--single_mask", action="store_true", help=text)
    masks.add_argument("--seed", type=non_negative_int, default=0, help="seed of masks and short samples (default: 0)")
    add_executor_arguments(parser.add_argument_group("work"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    generate(build_parser().parse_args(arguments))


if __name__ == "__main__":
    run_main(main)
