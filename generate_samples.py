"""Masked samples (HDF5) from text shards, with the tokenizer that they were made with.

    python generate_samples.py --dir pcfg_dataset -o pcfg_dataset/pretraining --dup_factor 5 --vocab_file vocab.txt \\
        --do_lower_case 1 --masked_lm_prob 0.15 --max_seq_length 32 --model_name bert-large-uncased \\
        --max_predictions_per_seq 5 --n_processes 32

On a laptop, with text that generate_pretraining.py made in seconds, and the objective of the paper (one mask a sentence):

    python generate_pretraining.py --rule-path rule_mini_mlm.txt --save-path mini --shard-num 2 --test-shard-num 1 \\
        --sentence-num 10000 --test-sentence-num 1000
    python generate_samples.py --dir mini -o mini/pretraining --vocab_file vocab.txt --max_seq_length 32 --single_mask

Text of a corpus (documents: one sentence a line, an empty line between two documents) is split into WordPieces and packed:

    python generate_samples.py --dir corpus -o corpus/pretraining --vocab_file vocab.txt --max_seq_length 512 --n_processes 2

training{i}.txt becomes train_shard_{k}.hdf5 with k = i * dup_factor + j, test{i}.txt becomes test_shard_{k}.hdf5. The tokenizer
goes into a folder named after --model_name beside them. A rerun of the same command makes what is missing or damaged.
"""

import argparse
import contextlib
from pathlib import Path

from pcfg.common.cli import Parser, non_negative_int, positive_int, probability, run_main
from pcfg.common.executors import add_executor_arguments, executor_options, run_jobs
from pcfg.common.files import InputError, Manifest, atomic_folder
from pcfg.common.text import TEXT_MANIFEST
from pretraining.data.masking import MaskingRule
from pretraining.data.sample_shards import (
    DOCUMENTS,
    Recipe,
    SampleJob,
    find_text_shards,
    is_of_documents,
    make_samples,
    missing_shards,
)
from pretraining.data.samples import SAMPLES_MANIFEST
from pretraining.data.vocabulary import TOKENIZER_FILES, Vocabulary, find_vocabulary
from pretraining.data.wordpiece import (
    check_same_tokenizer,
    find_own_tokenizer,
    ordinary_words_changed,
    save_own_tokenizer,
    save_wordpiece,
    wordpiece,
)


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that decide which words are masked, and by what."""
    masks = parser.add_argument_group("masks")
    masks.add_argument(
        "--dup_factor",
        type=positive_int,
        default=1,
        help="sample shards of each text shard, with different masks (default: 1)",
    )
    masks.add_argument(
        "--masked_lm_prob",
        type=probability,
        default=0.15,
        help="share of the tokens that are masked, [CLS] and [SEP] counted (default: 0.15)",
    )
    masks.add_argument(
        "--max_predictions_per_seq",
        type=positive_int,
        help="most masks a sample (default: 5; of documents --masked_lm_prob x --max_seq_length)",
    )
    masks.add_argument(
        "--mask_token_prob",
        type=probability,
        default=0.8,
        help="probability that a masked word becomes [MASK] (default: 0.8)",
    )
    masks.add_argument(
        "--random_token_prob",
        type=probability,
        default=0.1,
        help="probability that it becomes a uniformly drawn word; else it stays as it is (default: 0.1)",
    )
    masks.add_argument(
        "--single_mask",
        action="store_true",
        help="the paper's objective: one mask a sample, always [MASK]; the options above then count for nothing, "
        "--dup_factor excepted",
    )
    masks.add_argument("--seed", type=non_negative_int, default=0, help="seed of masks and short samples (default: 0)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--dir", type=Path, required=True, help="folder of training{i}.txt and test{i}.txt")
    files.add_argument("-o", "--output_dir", type=Path, required=True, help="folder for the samples and the tokenizer")
    files.add_argument(
        "--vocab_file",
        default="vocab.txt",
        help="vocabulary, or a model's tokenizer.json of BERT's kind; a bare name is looked up in --dir, then in the working "
        "directory (default: vocab.txt)",
    )
    files.add_argument(
        "--model_name",
        default="bert-large-uncased",
        help="name under which the tokenizer is saved in --output_dir; run_pretraining.py finds it by this name as "
        "--tokenizer_name (default: bert-large-uncased)",
    )
    files.add_argument("--overwrite", action="store_true", help="replace samples that were made otherwise")

    text = parser.add_argument_group("tokens")
    text.add_argument(
        "--text",
        choices=("auto", "sentences", DOCUMENTS),
        default="auto",
        help="sentences: of a known language, a sample each, a token a word, anything else is an error; documents: natural "
        "text, an empty line between two documents, split into WordPieces, its sentences packed into samples, none of two "
        f"documents; auto: documents where {TEXT_MANIFEST} in --dir names a corpus as their source (default: auto)",
    )
    text.add_argument(
        "--do_lower_case",
        type=int,
        choices=(0, 1),
        default=1,
        help="whether the tokenizer lower-cases; it may not change a word of sentences; of no effect on text that came with a "
        "tokenizer of its own (default: 1)",
    )
    text.add_argument(
        "--max_seq_length",
        type=positive_int,
        default=32,
        help="tokens a sample, [CLS], [SEP] and padding included; longer sentences are an error, or split over samples of "
        "documents (default: 32)",
    )
    text.add_argument(
        "--short_seq_prob",
        type=probability,
        help="of documents: share of samples with room for fewer tokens only, a number uniform in 2 .. all (default: 0.1, "
        "BERT's)",
    )

    add_mask_arguments(parser)
    work = parser.add_argument_group("work")
    add_executor_arguments(work)
    return parser


def check_model_name(name: str) -> None:
    """Refuse a --model_name that would lead out of the output folder."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("."):
        raise InputError(f"--model_name: {name!r} can't be a folder in --output_dir; give a name like bert-large-uncased")


def save_tokenizer_once(recipe: Recipe, own, model_name: str, manifest: Manifest) -> None:
    """Save the tokenizer as folder `model_name` beside the manifest, unless it is there and unchanged.

    `own` is the one that the text came with; None: the recipe's, BERT's kind.
    """
    names = [f"{model_name}/{file}" for file in TOKENIZER_FILES]
    if all(manifest.is_complete(name) for name in names):
        return
    with atomic_folder(manifest.path.parent / model_name) as folder:
        if own is None:
            save_wordpiece(folder, recipe.vocabulary, recipe.do_lower_case, recipe.max_seq_length, model_name)
        else:
            save_own_tokenizer(folder, own, recipe.vocabulary, recipe.max_seq_length, model_name)
    for name in names:
        manifest.add(name)


def read_recipe(args: argparse.Namespace) -> tuple:
    """What the flags say of the samples, and the tokenizer that the text came with, or None.

    Raises:
        InputError: they say what can't be, or there is no such vocabulary.
    """
    documents = is_of_documents(args.dir) if args.text == "auto" else args.text == DOCUMENTS
    short_seq_prob, most = args.short_seq_prob, args.max_predictions_per_seq
    if documents and args.max_seq_length < 3:
        raise InputError(f"--max_seq_length: {args.max_seq_length} leaves no room between [CLS] and [SEP]; give 3 or more")
    if short_seq_prob is not None and not documents:
        raise InputError(f"--short_seq_prob {short_seq_prob:g}: sentences aren't packed; leave it out or give --text documents")
    if most is None:
        most = max(1, round(args.masked_lm_prob * args.max_seq_length)) if documents else 5
    path = find_vocabulary(args.vocab_file, [args.dir])
    vocabulary = Vocabulary.read(path)
    if path.suffix == ".json":
        check_same_tokenizer(path, vocabulary, bool(args.do_lower_case))
    own = None if documents else find_own_tokenizer(args.dir, vocabulary)
    rule = MaskingRule(
        masked_lm_prob=args.masked_lm_prob,
        max_predictions=most,
        mask_token_prob=args.mask_token_prob,
        random_token_prob=args.random_token_prob,
        single_mask=args.single_mask,
        pieces=documents,
    )
    recipe = Recipe(
        vocabulary=vocabulary,
        do_lower_case=bool(args.do_lower_case) and own is None,
        max_seq_length=args.max_seq_length,
        dup_factor=args.dup_factor,
        rule=rule,
        seed=args.seed,
        documents=documents,
        short_seq_prob=(0.1 if short_seq_prob is None else short_seq_prob) if documents else 0.0,
    )
    return recipe, own


def describe_documents(manifest: Manifest) -> str:
    """Counts of all samples of documents, in a line."""
    entries = [manifest.entry(name) for name in manifest.names() if name.endswith(".hdf5")]
    samples, tokens, unknown, cut = (
        sum(entry[what] for entry in entries) for what in ("samples", "tokens", "unknown", "cut_sentences")
    )
    return (
        f"documents: {samples:,} samples of {tokens:,} WordPieces; {unknown:,} ({unknown / tokens:.2%}) are [UNK]; "
        f"{cut:,} sentences were split over samples"
    )


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    check_model_name(args.model_name)
    executor = executor_options(args, local="processes")
    recipe, own = read_recipe(args)
    text = find_text_shards(args.dir.absolute(), args.dup_factor)
    manifest = Manifest(args.output_dir / SAMPLES_MANIFEST, recipe.facts(), args.overwrite)
    remaining = missing_shards(text, manifest, args.overwrite)
    wanted, missing = (sum(len(shard.numbers) for shard in shards) for shards in (text, remaining))
    print(f"{len(text)} text shards, {wanted} sample shards: {wanted - missing} skipped (complete), {missing} to make")

    save_tokenizer_once(recipe, own, args.model_name, manifest)
    if remaining:
        changed = frozenset()
        if not recipe.documents:
            changed = ordinary_words_changed(recipe.vocabulary, own or wordpiece(recipe.vocabulary, recipe.do_lower_case))
        # Absolute, as a Ray task may run in another working directory.
        jobs = [SampleJob(shard, recipe, changed, args.output_dir.absolute()) for shard in remaining]
        with contextlib.closing(run_jobs(make_samples, jobs, what="masking", **executor)) as finished:
            for job, made in finished:
                for name, counts in made.items():
                    manifest.add(name, **counts, source=job.shard.path.name, source_sha256=job.shard.sha256)
    if recipe.documents:
        print(describe_documents(manifest))
    print(f"samples: {args.output_dir}; tokenizer: {args.output_dir / args.model_name}")


if __name__ == "__main__":
    run_main(main)
