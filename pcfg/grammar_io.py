"""Grammar files as text: the rules format and nltk's PCFG format, parsed into weighted rules with their places."""

import dataclasses
import math

from pcfg.artefacts import InputError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One weighted rule as it stands in a file.

    Args:
        left: the symbol that is rewritten.
        right: one or two symbols.
        probability: in [0, 1].
        place: "FILE:LINE", for messages.
    """

    left: str
    right: tuple[str, ...]
    probability: float
    place: str


def check_probability(probability: float, place: str) -> None:
    """Raise an `InputError` that names `place` unless `probability` is a number in [0, 1 + 1e-9]."""
    if not math.isfinite(probability) or not 0.0 <= probability <= 1.0 + 1e-9:
        raise InputError(f"{place}: probability {probability}; it must be a number from 0 to 1")


def parse_rules(text: str, source: str) -> list[Rule]:
    """The rules of a text in the rules format: `LHS RHS prob` or `LHS RHS1 RHS2 prob` a line, `#` opens a comment line.

    Raises:
        InputError: wrong number of fields; a probability that is not a number from 0 to 1.

    >>> parse_rules("# toy\\nS A A 1.0\\nA word 1.0", "toy.txt")[1]
    Rule(left='A', right=('word',), probability=1.0, place='toy.txt:3')
    """
    rules = []
    for number, line in enumerate(text.split("\n"), 1):
        fields, place = line.split(), f"{source}:{number}"
        if not fields or line.lstrip().startswith("#"):
            continue
        if len(fields) not in (3, 4):
            raise InputError(
                f"{place}: {len(fields)} fields in {line.strip()!r}; a rule is `LHS RHS prob` or `LHS RHS1 RHS2 prob`"
            )
        try:
            probability = float(fields[-1])
        except ValueError:
            raise InputError(f"{place}: probability {fields[-1]!r} is not a number") from None
        check_probability(probability, place)
        rules.append(Rule(fields[0], tuple(fields[1:-1]), probability, place))
    return rules


def parse_nltk(text: str, source: str) -> list[Rule]:
    """The rules of a text in nltk's PCFG format (`S -> NP VP [0.6] | 'word' [0.4]`), binarised; the start's rules first.

    nltk's reader parses the lines. Binarising is done here, as nltk's own `CFG.binarize` forgets the probabilities and
    gives `A -> B C D` and `A -> B E F` the same new symbol, which would change the language. A new symbol is named by the
    symbols it stands for, so its one rule has probability 1 and every sentence keeps its probability.

    Raises:
        InputError: a line that nltk can't read; a rule without symbols on the right; a word with a space in it; a word
            that is the name of a nonterminal too.
    """
    # nltk takes a second to import, and most grammars are in the rules format.
    from nltk.grammar import Nonterminal, read_grammar, standard_nonterm_parser

    start, productions, pending = None, [], ""
    for number, line in enumerate(text.split("\n"), 1):
        line, place = pending + line.strip(), f"{source}:{number}"
        pending = ""
        if not line or line.startswith("#"):
            continue
        if line.endswith("\\"):
            pending = line[:-1].rstrip() + " "
            continue
        if line.startswith("%start"):
            start = line.removeprefix("%start").strip()
            continue
        try:
            parsed = read_grammar([line], standard_nonterm_parser, probabilistic=True)[1]
        except ValueError as error:
            reason = str(error).split("\n")[-1]
            raise InputError(f"{place}: nltk can't read {line!r} ({reason})") from None
        productions += [(production, place) for production in parsed]

    rules, helpers = [], {}
    for production, place in productions:
        check_probability(production.prob(), place)
        rule, *introduced = _binarised(production, place, Nonterminal)
        rules.append(rule)
        for helper in introduced:
            helpers.setdefault(helper.left, helper)
    rules += helpers.values()
    words = {symbol: place for production, place in productions for symbol in production.rhs() if isinstance(symbol, str)}
    for rule in rules:
        if rule.left in words:
            raise InputError(f"{words[rule.left]}: {rule.left!r} is a word and a nonterminal; rename one of them")
    if start is not None and not any(rule.left == start for rule in rules):
        raise InputError(f"{source}: the start symbol {start!r} has no rule")
    return sorted(rules, key=lambda rule: rule.left != start) if start else rules


def _binarised(production, place: str, nonterminal_type: type) -> list[Rule]:
    """One nltk production as a rule of at most two symbols and the rules, of probability 1, of the symbols it introduces.

    A word in a longer rule gets the symbol `word:...`, the symbols after the first get their names joined by `+`; neither
    `:` nor `+` can be in the name of a nonterminal in nltk's format.
    """
    symbols = production.rhs()
    if not symbols:
        raise InputError(f"{place}: the right side of {production} is empty; rules that derive nothing are not supported")
    for symbol in symbols:
        if isinstance(symbol, str) and len(symbol.split()) != 1:
            raise InputError(f"{place}: the word {symbol!r}; a word has no spaces and is not empty")
    left, probability = production.lhs().symbol(), production.prob()
    if len(symbols) == 1:
        return [Rule(left, (str(symbols[0]),), probability, place)]
    names, preterminals, rules = [], [], []
    for symbol in symbols:
        if isinstance(symbol, nonterminal_type):
            names.append(symbol.symbol())
        else:
            names.append(f"word:{symbol}")
            preterminals.append(Rule(names[-1], (symbol,), 1.0, place))
    while len(names) > 2:
        rest = "+".join(names[1:])
        rules.append(Rule(left, (names[0], rest), probability, place))
        left, names, probability = rest, names[1:], 1.0
    return [*rules, Rule(left, tuple(names), probability, place), *preterminals]
