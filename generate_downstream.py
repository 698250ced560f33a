"""Labelled sentences for downstream tasks: CSV files for training and validation that share no sentence.

    python generate_downstream.py --rule-path rule_deep_mlm.txt --save-path pcfg_dataset --sentence-num 10000 --task-type B

A version for a laptop:

    python generate_downstream.py --rule-path rule_mini_mlm.txt --save-path mini --task-type C --sentence-num 1000 \\
        --validation-num 200

Writes into --save-path, for task B: pcfg_B.csv and pcfg_B_validation.csv (columns text,label), pcfg_B_labels.json (the
nonterminal of each label id) and manifest_downstream_B.json. Tasks, which pcfg/labels.py defines:

    A, B, C                         the nonterminal over the whole sentence, its first 4 and its first 2 words
    span --span 2:5                 over the third to the fifth word, a slice as in Python: pcfg_span_2-5.csv
    span --span=-3:                 over the last 3 words: pcfg_span_-3-end.csv
    depth                           the depth of the most probable parse: pcfg_depth.csv; the shipped grammars have one class
    state --position 6              the sixth state of a hidden Markov model (python -m pcfg.hmm): pcfg_state6.csv

Sentences that no nonterminal derives have no label. They are left out and counted; more of them than rows is an error, unless
--drop-unlabelled allows it. A rerun of the same command skips complete files. Memory: about 60 bytes per row and 200 MB.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
from pathlib import Path

import numpy as np

from pcfg.chart import MAX_WORDS
from pcfg.common.cli import Parser, folder_name, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError, Manifest, write_json
from pcfg.common.text import write_labelled
from pcfg.grammar import Grammar, find_rules
from pcfg.labels import LABEL_RULES, TASKS, LabelledSentences, Labeller, class_line, default_min_words
from pcfg.sampler import Sampler


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--rule-path", required=True, help="rules file, or the name of a shipped grammar")
    files.add_argument("--save-path", type=folder_name, required=True, help="folder for the CSV files; made if missing")
    files.add_argument("--overwrite", action="store_true", help="replace files of other arguments; default: refuse")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--sentence-num", type=positive_int, default=10_000, help="training rows; default 10000")
    rows.add_argument("--validation-num", type=positive_int, default=2_000, help="validation rows; default 2000")
    text = "rows for --adversarial_file, which share no sentence with the others; default 0: no such file"
    rows.add_argument("--adversarial-num", type=non_negative_int, default=0, help=text)
    text = "rows for --datafile of loss and trace, which share no sentence with the others; default 0: no such file"
    rows.add_argument("--text-num", type=non_negative_int, default=0, help=text)
    text = "shortest sentence; at least what the label needs; default 5, or the grammar's longest sentence if that is shorter"
    rows.add_argument("--min-words", type=positive_int, help=text)
    rows.add_argument("--length-limit", type=positive_int, default=32, help="sentences have fewer words than this; default 32")
    rows.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    labels = parser.add_argument_group("labels")
    labels.add_argument("--task-type", choices=TASKS, required=True, help="the task, see above")
    labels.add_argument("--label-rule", choices=LABEL_RULES, help="the score; default: posterior for states, else likelihood")
    text = "START:STOP (--span=-3: for one with a leading minus) of the task span; number of words of B (4) and C (2)"
    labels.add_argument("--span", type=span_argument, help=text)
    labels.add_argument("--position", type=positive_int, help="of the state, in words from 1; required with --task-type state")
    text = "leave out sentences without a label, however many; default: an error if they are more than the rows"
    labels.add_argument("--drop-unlabelled", action="store_true", help=text)
    return parser


def span_argument(text: str) -> int | str:
    """An argparse type: a number of words, or a slice as it is."""
    return text if ":" in text else positive_int(text)


def shortest_sentence(options: argparse.Namespace, grammar: Grammar, labeller: Labeller) -> int:
    """Words of the shortest sentence, checked against the longest."""
    min_words = options.min_words or default_min_words(grammar)
    least = max(min_words, labeller.min_words)
    cause = f"--min-words {least}"
    if least > min_words:
        cause = f"--span {labeller.span}" if options.position is None else f"--position {least}"
    if least > grammar.longest[0]:
        raise InputError(f"{cause}: the grammar's sentences have up to {grammar.longest[0]} words; ask for fewer")
    if least >= options.length_limit:
        limit = f"{least} words and fewer than --length-limit {options.length_limit}"
        raise InputError(f"{cause}: no sentence has at least {limit}; change one of them")
    if options.length_limit > MAX_WORDS + 1:
        raise InputError(f"--length-limit {options.length_limit}: must be {MAX_WORDS + 1} or less")
    return least


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    folder = Path(options.save_path)
    grammar = Grammar.read(find_rules(options.rule_path))
    labeller = Labeller(grammar, options.task_type, options.span, options.label_rule, options.position)
    min_words = shortest_sentence(options, grammar, labeller)
    numbers = {"training": options.sentence_num, "validation": options.validation_num}
    further = {"adversarial": options.adversarial_num, "text": options.text_num}
    numbers |= {split: number for split, number in further.items() if number}
    made_from = {
        "grammar_sha256": grammar.sha256,
        "task": labeller.task,
        "label_rule": labeller.rule,
        "span": labeller.span,
        "sentence_num": numbers,
        "min_words": min_words,
        "length_limit": options.length_limit,
        "seed": options.seed,
        "split_by": "SplitMix64 of words",
    }
    manifest = Manifest(folder / f"manifest_downstream_{labeller.task}.json", made_from, options.overwrite)
    names = {split: f"pcfg_{labeller.task}{'' if split == 'training' else f'_{split}'}.csv" for split in numbers}
    label_file = f"pcfg_{labeller.task}_labels.json"
    missing = [split for split, name in names.items() if not manifest.is_complete(name)]
    for split in (split for split in names if split not in missing):
        print(f"{folder / names[split]}: skipped, complete already")
    sentences = LabelledSentences(Sampler(grammar, options.length_limit - 1), labeller, numbers, options.seed, min_words)
    # All are drawn before any is written: a grammar that cannot fill one leaves no file behind.
    for split, rows in {split: sentences.draw(split, options.drop_unlabelled) for split in missing}.items():
        write_labelled(folder / names[split], rows.texts(), rows.labels)
        facts = {"rows": len(rows.labels), "distinct": rows.distinct, "classes": len(np.unique(rows.labels))}
        manifest.add(names[split], **facts, dropped=rows.dropped, ties=rows.ties)
        print(
            f"{folder / names[split]}: {len(rows.labels)} rows, {rows.distinct} of them distinct, {class_line(rows.labels)}; "
            f"{rows.dropped} sentences without a label dropped; {rows.ties} ties took the lowest id"
        )
    if not manifest.is_complete(label_file):
        ids = {str(number): name for number, name in enumerate(labeller.names)}
        write_json(folder / label_file, {**made_from, "names": ids})
        manifest.add(label_file)


if __name__ == "__main__":
    run_main(main)
