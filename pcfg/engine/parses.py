"""Best parses: the inside sweep with maxima (Viterbi), and the way back down from the top cell."""

import numpy as np
from numba import njit

from pcfg.engine.chart_plan import QUAD
from pcfg.engine.lanes import LANE_BYTES
from pcfg.engine.sweeps import gather, inside_block

# How a node of a derivation is rewritten: the number of its children, or a word.
WORD, UNARY, BINARY = 0, 1, 2


@njit(nogil=True)
def _children_of_slot(slot, kind, plan):
    """left child, first split, last split + 1 and right child of a product."""
    quads = plan.quad_start[kind + 1] - plan.quad_start[kind]
    if slot < QUAD * quads:
        quad = plan.quads[plan.quad_start[kind] + slot // QUAD]
        return quad[0], quad[1], quad[2], quad[3 + slot % QUAD]
    single = plan.singles[plan.single_start[kind] + slot - QUAD * quads]
    return single[0], single[1], single[2], single[3]


@njit(nogil=True)
def _best_rewrite(cell, symbol, lane, word_value, inside, plan):
    """How the best derivation of a cell's symbol begins: (WORD, 0, 0), (UNARY, cell, child) or (BINARY, rows of both parts)."""
    kind, row = plan.cell_kind[cell], cell * plan.number
    best, how, first, second = word_value, WORD, 0, 0
    if plan.cell_width[cell] > 1:
        place = plan.symbol_start[kind]
        while plan.symbols[place] != symbol:
            place += 1
        for rule in range(plan.rule_start[place], plan.rule_start[place + 1]):
            left, start, end, right = _children_of_slot(plan.rule_slot[rule], kind, plan)
            for split in range(plan.split_start[cell] + start - 1, plan.split_start[cell] + end - 1):
                left_row, right_row = plan.split_left[split] + left, plan.split_right[split] + right
                value = inside[left_row, lane] * inside[right_row, lane] * plan.rule_probability[rule]
                if value > best:
                    best, how, first, second = value, BINARY, left_row, right_row
    for chain in range(plan.chain_start[kind], plan.chain_start[kind + 1]):
        if plan.chains[chain, 0] == symbol:
            child = row + plan.chains[chain, 1]
            value = inside[child, lane] * plan.chain_probability[chain]
            if value > best:
                best, how, first, second = value, UNARY, child, 0
    return how, first, second


@njit(nogil=True, cache=True)
def best_sweep(tokens, rows, plan, columns, factor):
    """Best derivations of the start symbol over whole sentences.

    Args:
        tokens: (n, T or more) int32; rows: (m,) int64, the sentences to be taken.
        columns: (V, N) scaled emissions, factor: their common factor.

    Returns:
        nodes: (all nodes, 2) int32, nonterminal and number of children (0: a word) of the derivations' nodes in pre-order;
        ends: (m,) int64, where each sentence's nodes end; values: (m,), its scaled probability, 0 where there is no derivation.
    """
    count, number = LANE_BYTES // columns.itemsize, plan.number
    inside = np.empty((plan.cell_begin.size * number, count), columns.dtype)
    products = np.empty((plan.most_slots, count), columns.dtype)
    words = np.empty((plan.length, count), np.int32)
    nodes, used = np.empty((1024, 2), np.int32), 0
    ends, values = np.empty(rows.size, np.int64), np.empty(rows.size)
    # Each row on the stack is a word of its own still to come.
    stack = np.empty(plan.length + 1, np.int64)
    top = (plan.cell_begin.size - 1) * number
    for block in range((rows.size + count - 1) // count):
        gather(tokens, rows, block, words)
        inside_block(words, columns, factor, plan, inside, products, True)
        for lane in range(min(count, rows.size - block * count)):
            values[block * count + lane] = inside[top, lane]
            stack[0], depth = top, 1 if inside[top, lane] > 0 else 0
            while depth > 0:
                depth -= 1
                cell, symbol = stack[depth] // number, stack[depth] % number
                word_value = columns.dtype.type(0)
                if plan.cell_width[cell] == 1:
                    word_value = factor * columns[words[plan.cell_begin[cell], lane], symbol]
                how, first, second = _best_rewrite(cell, symbol, lane, word_value, inside, plan)
                if how == BINARY:
                    stack[depth] = second
                    depth += 1
                if how != WORD:
                    stack[depth] = first
                    depth += 1
                if used == len(nodes):
                    longer = np.empty((2 * used, 2), np.int32)
                    longer[:used] = nodes
                    nodes = longer
                nodes[used, 0], nodes[used, 1] = symbol, how
                used += 1
            ends[block * count + lane] = used
    return nodes[:used], ends, values


def tree(nodes: list, words: list[str], names: list[str], log2_probability: float):
    """The `nltk.Tree` of a derivation.

    Args:
        nodes: [nonterminal, number of children] in pre-order.
        words: the sentence.
        log2_probability: base-2 logarithm of the derivation's probability, which the root carries (`prob()`, `logprob()`).
    """
    # nltk takes a second to import, which those who want no trees should not pay.
    from nltk.tree import ProbabilisticTree, Tree

    # Backwards through the pre-order, the children of a node are the last trees that were finished, the first one on top.
    finished, leaves = [], list(words)
    for symbol, children in reversed(nodes):
        parts = [finished.pop() for _ in range(children)] if children else [leaves.pop()]
        finished.append(Tree(names[symbol], parts))
    return ProbabilisticTree(names[nodes[0][0]], list(finished[0]), logprob=log2_probability)
