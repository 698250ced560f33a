"""What follows from the shape of a grammar's rules alone, in time linear in the rules (but for a heap's logarithm).

A graph over nonterminals 0 .. N - 1 is given by its edges, `parent` and `child`, (E,) integers each: a rule has an edge from
its left side to each nonterminal on its right. Rules are given as `left`, `first`, `second`, (R,) integers each, with -1 as
the `second` of a unary rule; rules to words are given as `emits`, (N,) bool: whether a nonterminal has one.
"""

import numpy as np
from numba import njit

# A number of words that is this large, or infinite.
UNBOUNDED = 1 << 30


@njit(cache=True)
def _grouped(size, keys):
    """The places of each of the keys 0 .. size - 1: those of key k are place[start[k] : start[k + 1]]; -1 is left out."""
    start = np.zeros(size + 1, np.int64)
    for key in keys:
        if key >= 0:
            start[key + 1] += 1
    for key in range(size):
        start[key + 1] += start[key]
    place, free = np.empty(start[size], np.int64), start.copy()
    for position in range(keys.size):
        if keys[position] >= 0:
            place[free[keys[position]]] = position
            free[keys[position]] += 1
    return start, place


@njit(cache=True)
def strong_components(size, parent, child):
    """The strongly connected components of a graph, numbered so that every edge leads to the same or a lower number.

    Tarjan, "Depth-first search and linear graph algorithms" (1972), with a stack of its own: a chain may be long.

    Returns:
        (size,) int64, the number of each node's component, and (size,) int64, the nodes by ascending number.

    >>> component, order = strong_components(4, np.array([0, 1, 2, 2]), np.array([1, 2, 1, 3]))
    >>> component.tolist(), order.tolist()
    ([2, 1, 1, 0], [3, 2, 1, 0])
    """
    start, place = _grouped(size, parent)
    component = np.full(size, -1, np.int64)
    found = np.full(size, -1, np.int64)  # when a node was found
    low = np.zeros(size, np.int64)  # the earliest node, of those without a component, that it is known to reach
    edge = start[:-1].copy()  # the next edge to follow
    path, waiting, order = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    clock, components, depth, waits, done = 0, 0, 0, 0, 0
    for root in range(size):
        if found[root] >= 0:
            continue
        path[0], depth = root, 1
        while depth > 0:
            node = path[depth - 1]
            if found[node] < 0:
                found[node] = low[node] = clock
                clock += 1
                waiting[waits] = node
                waits += 1
            if edge[node] < start[node + 1]:
                target = child[place[edge[node]]]
                edge[node] += 1
                if found[target] < 0:
                    path[depth] = target
                    depth += 1
                elif component[target] < 0:
                    low[node] = min(low[node], found[target])
                continue
            depth -= 1
            if depth > 0:
                low[path[depth - 1]] = min(low[path[depth - 1]], low[node])
            if low[node] == found[node]:
                while component[node] < 0:
                    waits -= 1
                    component[waiting[waits]] = components
                    order[done] = waiting[waits]
                    done += 1
                components += 1
    return component, order


@njit(cache=True)
def reachable(size, parent, child, root):
    """Which nodes can be reached from `root`, itself included: (size,) bool.

    >>> reachable(4, np.array([0, 1, 3]), np.array([1, 0, 2]), 0).tolist()
    [True, True, False, False]
    """
    start, place = _grouped(size, parent)
    reached = np.zeros(size, np.bool_)
    todo, waits = np.empty(size, np.int64), 1
    todo[0], reached[root] = root, True
    while waits > 0:
        waits -= 1
        node = todo[waits]
        for edge in place[start[node] : start[node + 1]]:
            target = child[edge]
            if not reached[target]:
                reached[target] = True
                todo[waits] = target
                waits += 1
    return reached


@njit(cache=True)
def carry(marks, source, target):
    """Mark target[e] wherever source[e] is marked, edge by edge: whole chains, if the edges come in their order.

    >>> marks = np.array([True, False, False])
    >>> carry(marks, np.array([0, 1]), np.array([1, 2]))
    >>> marks.tolist()
    [True, True, True]
    """
    for edge in range(len(source)):
        if marks[source[edge]]:
            marks[target[edge]] = True


@njit(cache=True)
def _push(heap, used, key):
    """Add a key to the binary heap in heap[:used]; returns its new size. The least key is at 0."""
    place = used
    while place > 0 and heap[(place - 1) // 2] > key:
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = key
    return used + 1


@njit(cache=True)
def _pop(heap, used):
    """Remove the least key of the binary heap in heap[:used]; returns its new size."""
    used -= 1
    key, place = heap[used], 0
    while 2 * place + 1 < used:
        lower = 2 * place + 1
        if lower + 1 < used and heap[lower + 1] < heap[lower]:
            lower += 1
        if heap[lower] >= key:
            break
        heap[place] = heap[lower]
        place = lower
    heap[place] = key
    return used


@njit(cache=True)
def shortest_yields(left, first, second, emits):
    """The least number of words of each nonterminal, at most UNBOUNDED; -1 where it derives no sentence: (N,) int64.

    Knuth, "A generalization of Dijkstra's algorithm" (1977): nonterminals are settled in ascending order of their least
    number, and a rule counts once all of its right side is settled.

    >>> left, first, second = np.array([0, 1, 2]), np.array([1, 3, 2]), np.array([1, -1, 3])
    >>> shortest_yields(left, first, second, np.array([False, False, False, True])).tolist()
    [2, 1, -1, 1]
    """
    size = emits.size
    first_start, first_place = _grouped(size, first)
    second_start, second_place = _grouped(size, second)
    unsettled = np.ones(left.size, np.int64)
    for rule in second_place:
        unsettled[rule] = 2
    least = np.full(size, -1, np.int64)
    heap, used = np.empty(size + left.size, np.int64), 0  # words times N plus nonterminal
    for node in range(size):
        if emits[node]:
            used = _push(heap, used, size + node)
    while used > 0:
        words, node = heap[0] // size, heap[0] % size
        used = _pop(heap, used)
        if least[node] >= 0:
            continue
        least[node] = words
        with_first = first_start[node + 1] - first_start[node]
        for number in range(with_first + second_start[node + 1] - second_start[node]):
            if number < with_first:
                rule = first_place[first_start[node] + number]
            else:
                rule = second_place[second_start[node] + number - with_first]
            unsettled[rule] -= 1
            if unsettled[rule] == 0 and least[left[rule]] < 0:
                total = least[first[rule]]
                if second[rule] >= 0:
                    total += least[second[rule]]
                used = _push(heap, used, min(total, UNBOUNDED) * size + left[rule])
    return least


@njit(cache=True)
def longest_yields(left, first, second, emits, component, order):
    """The largest number of words of each nonterminal, UNBOUNDED where it is that or more: (N,) int64.

    What can come back to itself is unbounded, as a cycle, never of unary rules alone, adds words. The rest is a sum over
    children; `component` and `order` are the `strong_components` of all edges of the rules.

    >>> left, first, second = np.array([0, 1, 2]), np.array([1, 3, 2]), np.array([1, -1, 3])
    >>> emits = np.array([False, False, False, True])
    >>> longest_yields(left, first, second, emits, np.array([2, 1, 3, 0]), np.array([3, 1, 0, 2])).tolist()
    [2, 1, 1073741824, 1]
    """
    size = emits.size
    longest = emits.astype(np.int64)
    for rule in range(left.size):
        same = component[first[rule]] == component[left[rule]]
        if same or (second[rule] >= 0 and component[second[rule]] == component[left[rule]]):
            longest[left[rule]] = UNBOUNDED
    start, place = _grouped(size, left)
    for node in order:
        for rule in place[start[node] : start[node + 1]]:
            total = longest[first[rule]]
            if second[rule] >= 0:
                total += longest[second[rule]]
            longest[node] = max(longest[node], min(total, UNBOUNDED))
    return longest
