"""What a chart of a given sentence length has to compute, worked out once per length and not once per sentence.

Most of a chart is dead: a nonterminal can span only as many words as its yields can have, and only cells within reach of the
roots at the top cell matter. A `ChartPlan` lists the living cells by width and the work in each; the kernels of
`pcfg.engine.sweeps` read it as plain arrays.

What happens in a cell depends only on its width w and on which nonterminals live there. A child lives wherever both
children of its rule have yields of a fitting length. Cells of the same kind share a `Kind`, in which each pair of children
(B, C) with the splits d (words of B) where both are possible is a product

    products[slot] = sum over d of inside(i, i + d, B) inside(i + d, j, C)

and rules are (parent, slot, probability). Pairs of one left child with the same splits are taken four at a time, so that its
values are read once.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit

from pcfg.engine.rule_graph import Chains, carry

if TYPE_CHECKING:
    from pcfg.grammar import Grammar

MAX_WORDS = 64
QUAD = 4


class Kind(NamedTuple):
    """The work in a cell of `width` words where the nonterminals `symbols` live. Products: quads first, then singles."""

    width: int
    symbols: np.ndarray  # (S,) int32
    quads: np.ndarray  # (Q, 3 + QUAD) int32: left child, first d, last d + 1, right children
    singles: np.ndarray  # (L, 4) int32: left child, first d, last d + 1, right child
    rules: np.ndarray  # (E, 2) int32: parent (place in symbols), slot; by parent
    probability: np.ndarray  # (E,) float64
    chains: np.ndarray  # (K, 2) int32: parent, child of the steps of `pcfg.engine.rule_graph.Chains`
    chain_probability: np.ndarray  # (K,) float64
    unary: np.ndarray  # (U, 2) int32: parent, child of unary rules
    unary_probability: np.ndarray  # (U,) float64
    left: np.ndarray  # (width - 1, N) bool: what lives in the left part of a split after d = 1, 2, .. words
    right: np.ndarray  # (width - 1, N) bool: in the right part


class ChartPlan(NamedTuple):
    """The plan of one sentence length and set of roots, K kinds and C cells; probabilities in the dtype of the chart.

    Entries `x_start` are offsets: kind k has entries x_start[k] .. x_start[k + 1]. Cells come by width, so that the last
    cell is the top one. The values of cell c and nonterminal A are row c N + A of a chart.
    """

    length: int
    number: int  # N
    cell_begin: np.ndarray  # (C,) int32, first word
    cell_width: np.ndarray  # (C,) int32
    cell_kind: np.ndarray  # (C,) int32
    cell_of: np.ndarray  # (T, T + 1) int32, -1 where the chart is dead
    split_start: np.ndarray  # (C + 1,) int64: where the splits of a cell are in the two arrays below
    split_left: np.ndarray  # int32: first row of the left part at split_start[c] + d - 1 (0 if dead), d = 1, 2, ...
    split_right: np.ndarray  # int32: first row of the right part
    symbol_start: np.ndarray
    symbols: np.ndarray
    rule_start: np.ndarray  # (all symbols + 1,) int64: the rules of each parent
    rule_slot: np.ndarray
    rule_probability: np.ndarray
    quad_start: np.ndarray
    quads: np.ndarray
    single_start: np.ndarray
    singles: np.ndarray
    slot_start: np.ndarray  # (K + 1,) int64: where a kind's slots are in back_start
    back_start: np.ndarray  # (all slots + 1,) int64: the same rules by slot
    back_parent: np.ndarray
    back_probability: np.ndarray
    chain_start: np.ndarray
    chains: np.ndarray
    chain_probability: np.ndarray
    unary_start: np.ndarray
    unary: np.ndarray
    unary_probability: np.ndarray
    most_slots: int


def offsets(sizes: Any) -> np.ndarray:
    """Where groups of these sizes begin, and the end: one more than there are groups, int64."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


@njit(cache=True)
def _mark_widths(possible, binary, steps):
    """Mark possible[A, w] by the binary rules whose children have yields of w words together, then by chains of unary rules."""
    for width in range(1, possible.shape[1]):
        for rule in range(len(binary)):
            parent, first, second = binary[rule]
            for words in range(1, width):
                if possible[parent, width]:
                    break
                possible[parent, width] = possible[first, words] and possible[second, width - words]
        carry(possible[:, width], steps[:, 1], steps[:, 0])


class ChartPlans:
    """The plans of a grammar, each made at its first use."""

    def __init__(self, grammar: "Grammar"):
        self._number = len(grammar.names)
        # possible[A, w]: whether A derives some string of w words
        self._possible = np.zeros((len(grammar.names), MAX_WORDS + 1), dtype=bool)
        self._possible[:, 1] = grammar.emission.any(axis=1)
        _mark_widths(self._possible, grammar.binary, grammar.chains.steps)
        # The rules come sorted by (left child, right child, parent), which is the order of `unique` too.
        self._pairs, self._pair_of_rule = np.unique(grammar.binary[:, 1:], axis=0, return_inverse=True)
        self._pair_of_rule = self._pair_of_rule.reshape(-1)
        self._parent = grammar.binary[:, 0]
        self._probability = grammar.binary_probability
        self._unary = grammar.unary
        self._unary_probability = grammar.unary_probability
        self._chains = (grammar.chains, grammar.best_chains)
        self._kinds: dict[tuple, Kind] = {}
        self._plans: dict[tuple, ChartPlan | None] = {}

    def of(self, length: int, roots: Iterable[int] | None, dtype: str, best: bool = False) -> ChartPlan | None:
        """The plan of sentences of `length` words, for sums or for best parses; None where no root derives so many.

        `roots` are the nonterminals whose value over the whole sentence is needed; None: every nonterminal in every cell.
        """
        key = (length, None if roots is None else tuple(roots), dtype, best)
        if key not in self._plans:
            living = self._living(length, roots, best)
            self._plans[key] = self._assemble(length, living, dtype) if living else None
        return self._plans[key]

    def _living(self, length: int, roots: Iterable[int] | None, best: bool) -> dict[tuple[int, int], Kind]:
        """The kind of each living cell (begin, width), the widest first."""
        alive = np.zeros((length, length + 1, self._number), dtype=bool)
        alive[0, length, slice(None) if roots is None else np.asarray(roots)] = True
        kinds: dict[tuple[int, int], Kind] = {}
        for width in range(length, 0, -1):
            for begin in range(length - width + 1):
                end = begin + width
                if roots is None:
                    alive[begin, end] = True
                alive[begin, end] &= self._possible[:, width]
                if not alive[begin, end].any():
                    continue
                key = (width, np.packbits(alive[begin, end]).tobytes(), best)
                if key not in self._kinds:
                    self._kinds[key] = self._make_kind(width, alive[begin, end], self._chains[best])
                kind = kinds[begin, width] = self._kinds[key]
                alive[begin, begin + 1 : end] |= kind.left
                alive[begin + 1 : end, end] |= kind.right
        return kinds

    def _make_kind(self, width: int, alive: np.ndarray, chains: Chains) -> Kind:
        alive = alive.copy()
        carry(alive, *chains.steps[::-1].T)  # parents first
        # What a child cannot derive, its own children by unary rules cannot either.
        alive &= self._possible[:, width]
        chained = alive[chains.steps].all(axis=1)
        rewrites = alive[self._unary].all(axis=1)
        pairs = np.unique(self._pair_of_rule[alive[self._parent]])
        left, right = self._pairs[pairs].T
        # (pairs, width - 1): whether the pair can be split after d words
        fits = self._possible[left, 1:width] & self._possible[right, width - 1 : 0 : -1]
        lives = np.zeros((2, width - 1, self._number), dtype=bool)
        pair, split = np.nonzero(fits)
        lives[0, split, left[pair]] = lives[1, split, right[pair]] = True

        edges = np.diff(np.pad(fits, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        pair, first = np.nonzero(edges == 1)  # runs of splits, by pair
        last = np.nonzero(edges == -1)[1]
        quads, singles, slots = _grouped(left[pair], first + 1, last + 1, right[pair])

        symbols = np.flatnonzero(alive).astype(np.int32)
        # A rule has as many entries as its pair has runs.
        run_number = np.bincount(pairs[pair], minlength=len(self._pairs))
        run_start = offsets(run_number)
        rule = np.flatnonzero(alive[self._parent] & (run_number[self._pair_of_rule] > 0))
        rule = rule[np.argsort(self._parent[rule], kind="stable")]
        repeats = run_number[self._pair_of_rule[rule]]
        within = np.arange(repeats.sum()) - np.repeat(offsets(repeats)[:-1], repeats)
        rule = np.repeat(rule, repeats)
        slot = slots[run_start[self._pair_of_rule[rule]] + within]
        rules = np.column_stack([np.searchsorted(symbols, self._parent[rule]), slot]).astype(np.int32)
        steps = (chains.steps[chained], chains.probability[chained])
        unary = (self._unary[rewrites], self._unary_probability[rewrites])
        return Kind(width, symbols, quads, singles, rules, self._probability[rule], *steps, *unary, *lives)

    def _assemble(self, length: int, living: dict[tuple[int, int], Kind], dtype: str) -> ChartPlan:
        cells = list(living)[::-1]
        begin, width = np.ascontiguousarray(np.array(cells, dtype=np.int32).T)
        cell_of = np.full((length, length + 1), -1, dtype=np.int32)
        cell_of[begin, begin + width] = np.arange(len(cells))
        rows = np.maximum(cell_of, 0) * self._number
        kinds = list({id(kind): kind for kind in living.values()}.values())
        place = {id(kind): number for number, kind in enumerate(kinds)}
        slots = np.array([QUAD * len(kind.quads) + len(kind.singles) for kind in kinds])
        rules_of_parent = [np.bincount(kind.rules[:, 0], minlength=len(kind.symbols)) for kind in kinds]
        rules_of_slot = [np.bincount(kind.rules[:, 1], minlength=number) for kind, number in zip(kinds, slots, strict=True)]
        by_slot = [np.argsort(kind.rules[:, 1], kind="stable") for kind in kinds]

        def joined(parts: list, kind: Any = np.int32) -> np.ndarray:
            return np.ascontiguousarray(np.concatenate(parts), dtype=kind)

        return ChartPlan(
            length=length,
            number=self._number,
            cell_begin=begin,
            cell_width=width,
            cell_kind=np.array([place[id(living[cell])] for cell in cells], dtype=np.int32),
            cell_of=cell_of,
            split_start=offsets(width - 1),
            split_left=joined([rows[i, i + 1 : i + w] for i, w in cells]),
            split_right=joined([rows[i + 1 : i + w, i + w] for i, w in cells]),
            symbol_start=offsets([len(kind.symbols) for kind in kinds]),
            symbols=joined([kind.symbols for kind in kinds]),
            rule_start=offsets(np.concatenate(rules_of_parent)),
            rule_slot=joined([kind.rules[:, 1] for kind in kinds]),
            rule_probability=joined([kind.probability for kind in kinds], dtype),
            quad_start=offsets([len(kind.quads) for kind in kinds]),
            quads=joined([kind.quads for kind in kinds]),
            single_start=offsets([len(kind.singles) for kind in kinds]),
            singles=joined([kind.singles for kind in kinds]),
            slot_start=offsets(slots),
            back_start=offsets(np.concatenate(rules_of_slot)),
            back_parent=joined([kind.symbols[kind.rules[order, 0]] for kind, order in zip(kinds, by_slot, strict=True)]),
            back_probability=joined([k.probability[order] for k, order in zip(kinds, by_slot, strict=True)], dtype),
            chain_start=offsets([len(kind.chains) for kind in kinds]),
            chains=joined([kind.chains for kind in kinds]),
            chain_probability=joined([kind.chain_probability for kind in kinds], dtype),
            unary_start=offsets([len(kind.unary) for kind in kinds]),
            unary=joined([kind.unary for kind in kinds]),
            unary_probability=joined([kind.unary_probability for kind in kinds], dtype),
            most_slots=int(slots.max(initial=0)),
        )


def _grouped(
    left: np.ndarray, first: np.ndarray, last: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of splits in groups of four of one left child and the same splits; what is left over stays single.

    Returns:
        quads (Q, 3 + QUAD), singles (L, 4) int32, and the slot of each run, (runs,) int64.
    """
    order = np.lexsort((right, last, first, left))
    key = np.column_stack([left, first, last])[order]
    group = np.cumsum(np.diff(key, axis=0, prepend=key[:1]).any(axis=1))
    size = np.bincount(group)
    within = np.arange(len(order)) - offsets(size)[group]
    in_quad = within < (size // QUAD * QUAD)[group]
    quad_runs = order[in_quad]
    single_runs = order[~in_quad]
    slots = np.argsort(np.concatenate([quad_runs, single_runs]))  # which inverts the permutation
    quads = np.column_stack([key[in_quad][::QUAD], right[quad_runs].reshape(-1, QUAD)])
    singles = np.column_stack([key[~in_quad], right[single_runs]])
    return quads.astype(np.int32), singles.astype(np.int32), slots
