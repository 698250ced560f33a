"""The kernels of the charts: inside, outside and best-parse sweeps over blocks of sentences of one length, in lockstep.

A block has one sentence per lane; its charts are arrays of lanes with row c N + A for cell c and nonterminal A of a
`pcfg.engine.chart_plan.ChartPlan`. `best` chooses the semiring: None sums over derivations, anything else takes the best one
(numba compiles the two apart, so that the choice costs nothing).
"""

import numpy as np
from numba import njit

from pcfg import PLAIN_LANES
from pcfg.engine.chart_plan import QUAD
from pcfg.engine.plain_lanes import LANE_BYTES

if PLAIN_LANES:
    from pcfg.engine.plain_lanes import divide, load, log, maximum, multiply, multiply_add, splat, store
else:
    from pcfg.engine.lanes import divide, load, log, maximum, multiply, multiply_add, splat, store

# How a node of a derivation is rewritten: the number of its children, or a word.
WORD = 0
UNARY = 1
BINARY = 2


@njit(inline="always")
def _add(first, second, total, best):
    """total + first * second, or the larger of the two."""
    if best is None:
        return multiply_add(first, second, total)
    return maximum(total, multiply(first, second))


@njit(nogil=True)
def _quad(plan, number):
    """left child, first d, last d + 1, right children; numba would unpack an array's row slowly."""
    quad = plan.quads[number]
    return quad[0], quad[1], quad[2], quad[3], quad[4], quad[5], quad[6]


@njit(nogil=True)
def _single(plan, number):
    """left child, first d, last d + 1, right child."""
    single = plan.singles[number]
    return single[0], single[1], single[2], single[3]


@njit(nogil=True)
def _products(cell, kind, plan, inside, products, best):
    """products[slot] of one cell: see `pcfg.engine.chart_plan`."""
    zero = splat(inside.dtype.type(0))
    first_quad = plan.quad_start[kind]
    last_quad = plan.quad_start[kind + 1]
    first_split = plan.split_start[cell] - 1
    for number in range(first_quad, last_quad):
        left, start, end, c0, c1, c2, c3 = _quad(plan, number)
        p0 = p1 = p2 = p3 = zero
        for split in range(first_split + start, first_split + end):
            value = load(inside, plan.split_left[split] + left)
            right = plan.split_right[split]
            p0 = _add(value, load(inside, right + c0), p0, best)
            p1 = _add(value, load(inside, right + c1), p1, best)
            p2 = _add(value, load(inside, right + c2), p2, best)
            p3 = _add(value, load(inside, right + c3), p3, best)
        slot = QUAD * (number - first_quad)
        store(products, slot, p0)
        store(products, slot + 1, p1)
        store(products, slot + 2, p2)
        store(products, slot + 3, p3)
    slot = QUAD * (last_quad - first_quad)
    for number in range(plan.single_start[kind], plan.single_start[kind + 1]):
        left, start, end, right = _single(plan, number)
        total = zero
        for split in range(first_split + start, first_split + end):
            value = load(inside, plan.split_left[split] + left)
            total = _add(value, load(inside, plan.split_right[split] + right), total, best)
        store(products, slot, total)
        slot += 1


@njit(nogil=True)
def _inside_block(words, columns, factor, plan, inside, products, best):
    """Fill the living entries of `inside`; `columns`, (V, N), are the emissions of each word, times `factor`."""
    zero = splat(inside.dtype.type(0))
    number = plan.number
    for cell in range(plan.cell_begin.size):
        kind = plan.cell_kind[cell]
        row = cell * number
        first = plan.symbol_start[kind]
        last = plan.symbol_start[kind + 1]
        if plan.cell_width[cell] == 1:
            for lane in range(words.shape[1]):
                column = columns[words[plan.cell_begin[cell], lane]]
                for place in range(first, last):
                    inside[row + plan.symbols[place], lane] = factor * column[plan.symbols[place]]
        else:
            _products(cell, kind, plan, inside, products, best)
            for place in range(first, last):
                total = zero
                for rule in range(plan.rule_start[place], plan.rule_start[place + 1]):
                    product = load(products, plan.rule_slot[rule])
                    total = _add(product, splat(plan.rule_probability[rule]), total, best)
                store(inside, row + plan.symbols[place], total)
        for chain in range(plan.chain_start[kind], plan.chain_start[kind + 1]):
            parent = row + plan.chains[chain, 0]
            child = row + plan.chains[chain, 1]
            probability = splat(plan.chain_probability[chain])
            store(inside, parent, _add(load(inside, child), probability, load(inside, parent), best))


@njit(nogil=True)
def _spread(cell, kind, plan, inside, outside, weights):
    """Hand outside(i, j, .) of one cell, with the rules' probabilities in `weights`, down to its parts over all splits."""
    first_quad = plan.quad_start[kind]
    last_quad = plan.quad_start[kind + 1]
    first_split = plan.split_start[cell] - 1
    for number in range(first_quad, last_quad):
        left, start, end, c0, c1, c2, c3 = _quad(plan, number)
        slot = QUAD * (number - first_quad)
        w0 = load(weights, slot)
        w1 = load(weights, slot + 1)
        w2 = load(weights, slot + 2)
        w3 = load(weights, slot + 3)
        for split in range(first_split + start, first_split + end):
            place = plan.split_left[split] + left
            right = plan.split_right[split]
            value = load(inside, place)
            total = load(outside, place)
            total = multiply_add(w0, load(inside, right + c0), total)
            total = multiply_add(w1, load(inside, right + c1), total)
            total = multiply_add(w2, load(inside, right + c2), total)
            store(outside, place, multiply_add(w3, load(inside, right + c3), total))
            store(outside, right + c0, multiply_add(w0, value, load(outside, right + c0)))
            store(outside, right + c1, multiply_add(w1, value, load(outside, right + c1)))
            store(outside, right + c2, multiply_add(w2, value, load(outside, right + c2)))
            store(outside, right + c3, multiply_add(w3, value, load(outside, right + c3)))
    slot = QUAD * (last_quad - first_quad)
    for number in range(plan.single_start[kind], plan.single_start[kind + 1]):
        left, start, end, right = _single(plan, number)
        weight = load(weights, slot)
        for split in range(first_split + start, first_split + end):
            place = plan.split_left[split] + left
            other = plan.split_right[split] + right
            value = load(inside, place)
            store(outside, place, multiply_add(weight, load(inside, other), load(outside, place)))
            store(outside, other, multiply_add(weight, value, load(outside, other)))
        slot += 1


@njit(nogil=True)
def _outside_block(plan, narrowest, inside, outside, weights):
    """Fill the living entries of `outside` in cells of `narrowest` words and more; all of a single word's.

    A child's outside value does not depend on its own words: the plan leaves out only what cannot have their number.
    """
    zero = splat(inside.dtype.type(0))
    number = plan.number
    for cell in range(plan.cell_begin.size):
        kind = plan.cell_kind[cell]
        row = cell * number
        if plan.cell_width[cell] == 1:
            for symbol in range(number):
                store(outside, row + symbol, zero)
        else:
            for place in range(plan.symbol_start[kind], plan.symbol_start[kind + 1]):
                store(outside, row + plan.symbols[place], zero)
    store(outside, (plan.cell_begin.size - 1) * number, splat(inside.dtype.type(1)))
    for cell in range(plan.cell_begin.size - 1, -1, -1):
        kind = plan.cell_kind[cell]
        row = cell * number
        for chain in range(plan.chain_start[kind + 1] - 1, plan.chain_start[kind] - 1, -1):
            parent = row + plan.chains[chain, 0]
            child = row + plan.chains[chain, 1]
            probability = splat(plan.chain_probability[chain])
            store(outside, child, multiply_add(load(outside, parent), probability, load(outside, child)))
        if plan.cell_width[cell] <= narrowest or plan.cell_width[cell] == 1:
            continue
        first = plan.slot_start[kind]
        for slot in range(plan.slot_start[kind + 1] - first):
            total = zero
            for rule in range(plan.back_start[first + slot], plan.back_start[first + slot + 1]):
                parent = load(outside, row + plan.back_parent[rule])
                total = multiply_add(parent, splat(plan.back_probability[rule]), total)
            store(weights, slot, total)
        _spread(cell, kind, plan, inside, outside, weights)


@njit(nogil=True)
def _scratch(plan, columns):
    """Arrays of a block, without values: words (T, lanes) int32; inside, outside and products, which are arrays of lanes."""
    count = LANE_BYTES // columns.itemsize
    size = plan.cell_begin.size * plan.number
    inside = np.empty((size, count), columns.dtype)
    outside = np.empty((size, count), columns.dtype)
    return np.empty((plan.length, count), np.int32), inside, outside, np.empty((plan.most_slots, count), columns.dtype)


@njit(nogil=True)
def _gather(tokens, rows, block, words):
    """Fill words[t, lane] for a block of rows, and return how many it has; the last one fills the lanes left over."""
    count = words.shape[1]
    for lane in range(count):
        row = rows[min(block * count + lane, rows.size - 1)]
        for t in range(words.shape[0]):
            words[t, lane] = tokens[row, t]
    return min(count, rows.size - block * count)


@njit(nogil=True, cache=True)
def score_sweep(tokens, rows, plan, columns, factor, cell, with_outside, symbols, places, scores):
    """Values of one cell of each sentence.

    Args:
        tokens: (n, T or more) int32; rows: (m,) int64, the sentences.
        cell: cell of the plan; with_outside: whether the scores are inside times outside, or inside alone.
        symbols: nonterminals that live in the cell; places: their columns in `scores`.
        scores: (n, S), filled in the rows and columns named.
    """
    words, inside, outside, products = _scratch(plan, columns)
    count = words.shape[1]
    for block in range((rows.size + count - 1) // count):
        used = _gather(tokens, rows, block, words)
        _inside_block(words, columns, factor, plan, inside, products, None)
        if with_outside:
            _outside_block(plan, plan.cell_width[cell], inside, outside, products)
        for place in range(symbols.size):
            row = cell * plan.number + symbols[place]
            for lane in range(used):
                value = inside[row, lane] * outside[row, lane] if with_outside else inside[row, lane]
                scores[rows[block * count + lane], places[place]] = value


@njit(nogil=True, cache=True)
def chart_sweep(sentence, plan, columns):
    """inside and outside of one sentence (T,): arrays of lanes that are all the same."""
    words, inside, outside, products = _scratch(plan, columns)
    inside[:] = 0
    outside[:] = 0
    for t in range(plan.length):
        words[t] = sentence[t]
    _inside_block(words, columns, columns.dtype.type(1), plan, inside, products, None)
    _outside_block(plan, 1, inside, outside, products)
    return inside, outside


@njit(nogil=True)
def _conditionals(outside, row, emission, joint):
    """joint[w] = sum_A outside(t, t + 1, A) P(A -> w) for all words; returns their sum."""
    word_start, word_symbol, word_probability = emission
    zero = splat(outside.dtype.type(0))
    total = zero
    for word in range(word_start.size - 1):
        value = zero
        for entry in range(word_start[word], word_start[word + 1]):
            value = multiply_add(load(outside, row + word_symbol[entry]), splat(word_probability[entry]), value)
        store(joint, word, value)
        total = multiply_add(value, splat(outside.dtype.type(1)), total)
    return total


@njit(nogil=True)
def _normalise(joint, inverse, sums, with_entropy):
    """joint[w] becomes P(w | x_-t); row 1 of `sums` gets sum_w P log P if `with_entropy`."""
    total = splat(joint.dtype.type(0))
    for word in range(joint.shape[0]):
        probability = multiply(load(joint, word), inverse)
        store(joint, word, probability)
        if with_entropy:
            total = multiply_add(probability, log(probability), total)
    store(sums, 1, total)


@njit(nogil=True, cache=True)
def word_sweep(tokens, rows, first_row, plan, columns, factor, emission, conditionals, entropy, log_true, totals):
    """Masked conditionals of all positions.

    Args:
        first_row: (n,) int64, where the positions of each sentence begin in the results.
        emission: (word_start, word_symbol, word_probability), P(A -> w) by word.
        conditionals: (M, V), or (0, V) to leave them out; entropy, log_true: (M,) or (0,).
        totals: (n,), inside of the start symbol over the whole sentence, scaled.
    """
    words, inside, outside, products = _scratch(plan, columns)
    count = words.shape[1]
    vocabulary = columns.shape[0]
    joint = np.empty((vocabulary, count), columns.dtype)
    sums = np.empty((2, count), columns.dtype)
    top = (plan.cell_begin.size - 1) * plan.number
    one = splat(columns.dtype.type(1))
    for block in range((rows.size + count - 1) // count):
        used = _gather(tokens, rows, block, words)
        _inside_block(words, columns, factor, plan, inside, products, None)
        _outside_block(plan, 1, inside, outside, products)
        for lane in range(used):
            totals[rows[block * count + lane]] = inside[top, lane]
        for t in range(plan.length):
            cell = plan.cell_of[t, t + 1]
            if cell < 0:
                continue
            total = _conditionals(outside, cell * plan.number, emission, joint)
            store(sums, 0, total)
            _normalise(joint, divide(one, total), sums, entropy.size > 0)
            for lane in range(used):
                row = first_row[rows[block * count + lane]] + t
                if entropy.size:
                    entropy[row] = -sums[1, lane]
                    log_true[row] = np.log(np.float64(joint[words[t, lane], lane]))
                if conditionals.size:
                    for word in range(vocabulary):
                        conditionals[row, word] = joint[word, lane]


@njit(nogil=True)
def _children_of_slot(slot, kind, plan):
    """left child, first split, last split + 1 and right child of a product."""
    quads = plan.quad_start[kind + 1] - plan.quad_start[kind]
    if slot < QUAD * quads:
        quad = plan.quads[plan.quad_start[kind] + slot // QUAD]
        return quad[0], quad[1], quad[2], quad[3 + slot % QUAD]
    return _single(plan, plan.single_start[kind] + slot - QUAD * quads)


@njit(nogil=True)
def _best_rewrite(cell, symbol, lane, word_value, inside, plan):
    """How the best derivation of a cell's symbol begins: (WORD, 0, 0), (UNARY, cell, child) or (BINARY, rows of both parts)."""
    kind = plan.cell_kind[cell]
    best = word_value
    rewrite = (WORD, 0, 0)
    if plan.cell_width[cell] > 1:
        place = plan.symbol_start[kind]
        while plan.symbols[place] != symbol:
            place += 1
        for rule in range(plan.rule_start[place], plan.rule_start[place + 1]):
            left, start, end, right = _children_of_slot(plan.rule_slot[rule], kind, plan)
            for split in range(plan.split_start[cell] + start - 1, plan.split_start[cell] + end - 1):
                left_row = plan.split_left[split] + left
                right_row = plan.split_right[split] + right
                value = inside[left_row, lane] * inside[right_row, lane] * plan.rule_probability[rule]
                if value > best:
                    best = value
                    rewrite = (BINARY, left_row, right_row)
    for rule in range(plan.unary_start[kind], plan.unary_start[kind + 1]):
        if plan.unary[rule, 0] == symbol:
            child = cell * plan.number + plan.unary[rule, 1]
            value = inside[child, lane] * plan.unary_probability[rule]
            if value > best:
                best = value
                rewrite = (UNARY, child, 0)
    return rewrite


@njit(nogil=True, cache=True)
def best_sweep(tokens, rows, plan, columns, factor):
    """Best derivations of the start symbol over the sentences `rows`, (m,) int64, of `tokens`, (n, T or more) int32.

    Returns:
        nodes: (all nodes, 2) int32, nonterminal and number of children (0: a word) of the derivations' nodes in pre-order;
        ends: (m,) int64, where each sentence's nodes end; values: (m,), its scaled probability, 0 without a derivation.
    """
    words, inside, _, products = _scratch(plan, columns)
    count = words.shape[1]
    number = plan.number
    nodes = np.empty((1024, 2), np.int32)
    used = 0
    ends = np.empty(rows.size, np.int64)
    values = np.empty(rows.size)
    # Each row on the stack is a word of its own still to come.
    stack = np.empty(plan.length + 1, np.int64)
    top = (plan.cell_begin.size - 1) * number
    for block in range((rows.size + count - 1) // count):
        block_rows = _gather(tokens, rows, block, words)
        _inside_block(words, columns, factor, plan, inside, products, True)
        for lane in range(block_rows):
            values[block * count + lane] = inside[top, lane]
            stack[0] = top
            depth = 1 if inside[top, lane] > 0 else 0
            while depth > 0:
                depth -= 1
                cell = stack[depth] // number
                symbol = stack[depth] % number
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
                    nodes = np.concatenate((nodes, np.empty_like(nodes)))
                nodes[used, 0] = symbol
                nodes[used, 1] = how
                used += 1
            ends[block * count + lane] = used
    return nodes[:used], ends, values
