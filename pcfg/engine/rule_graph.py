"""Properties that follow from the shape of a grammar's rules alone, in time linear in the rules (but for sorting and a heap).

A graph over nonterminals 0 .. N - 1 consists of edges `parent` and `child`, (E,) integers each: a rule has an edge from its
left side to each nonterminal on its right. Rules are `left`, `first` and `second`, (R,) integers each; `second` is -1 in a
unary rule. `emits`, (N,) bool, says which nonterminals have a rule to a word.

`scipy.sparse.csgraph` has components and searches too, but importing them takes 0.2 s, a fifth of a generator's start.
"""

import heapq

import numpy as np
from numba import njit

# A number of words that is this large, or infinite.
UNBOUNDED = 1 << 30


@njit(cache=True)
def _grouped(size, keys):
    """Where each of the keys 0 .. size - 1 is: key k at place[start[k] : start[k + 1]], ascending; -1 is left out."""
    start = np.zeros(size + 1, np.int64)
    for key in keys:
        if key >= 0:
            start[key + 1] += 1
    start = np.cumsum(start)
    place = np.empty(start[size], np.int64)
    free = start.copy()
    for position in range(keys.size):
        if keys[position] >= 0:
            place[free[keys[position]]] = position
            free[keys[position]] += 1
    return start, place


@njit(cache=True)
def strong_components(size, parent, child):
    """Each node's strongly connected component, (size,) int64; every edge leads to the same or a lower number.

    Tarjan, "Depth-first search and linear graph algorithms" (1972), with a stack of its own: a chain may be long.

    >>> strong_components(4, np.array([0, 1, 2, 2]), np.array([1, 2, 1, 3])).tolist()
    [2, 1, 1, 0]
    """
    start, place = _grouped(size, parent)
    component = np.full(size, -1, np.int64)
    visit = np.full(size, -1, np.int64)  # the time of the first visit
    low = np.zeros(size, np.int64)  # the earliest node without a component that the node is known to reach
    edge = start[:-1].copy()  # the next edge to follow
    path = np.empty(size, np.int64)
    waiting = np.empty(size, np.int64)
    clock = components = waits = 0
    for root in range(size):
        if visit[root] >= 0:
            continue
        path[0] = root
        depth = 1
        while depth > 0:
            node = path[depth - 1]
            if visit[node] < 0:
                visit[node] = low[node] = clock
                clock += 1
                waiting[waits] = node
                waits += 1
            if edge[node] < start[node + 1]:
                target = child[place[edge[node]]]
                edge[node] += 1
                if visit[target] < 0:
                    path[depth] = target
                    depth += 1
                elif component[target] < 0:
                    low[node] = min(low[node], visit[target])
                continue
            depth -= 1
            if depth > 0:
                low[path[depth - 1]] = min(low[path[depth - 1]], low[node])
            if low[node] == visit[node]:
                while component[node] < 0:
                    waits -= 1
                    component[waiting[waits]] = components
                components += 1
    return component


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


def reachable(component: np.ndarray, parent: np.ndarray, child: np.ndarray, root: int) -> np.ndarray:
    """Which nodes can be reached from `root`, itself included, (N,) bool; `component` as `strong_components` numbers them.

    >>> reachable(np.array([0, 0, 1, 2]), np.array([0, 1, 3]), np.array([1, 0, 2]), 0).tolist()
    [True, True, False, False]
    """
    marks = np.arange(len(component)) == component[root]  # of components, of which there are at most N
    edges = np.argsort(-component[parent], kind="stable")
    carry(marks, component[parent[edges]], component[child[edges]])
    return marks[component]


@njit(cache=True)
def shortest_yields(left, first, second, emits):
    """The least number of words of each nonterminal, at most UNBOUNDED; -1 where it derives no sentence: (N,) int64.

    Knuth, "A generalization of Dijkstra's algorithm" (1977): nonterminals are settled in ascending order of their least
    number, and a rule counts once all of its right side is settled.

    >>> left, first, second = np.array([0, 1, 2]), np.array([1, 3, 2]), np.array([1, -1, 3])
    >>> shortest_yields(left, first, second, np.array([False, False, False, True])).tolist()
    [2, 1, -1, 1]
    """
    first_start, first_place = _grouped(emits.size, first)
    second_start, second_place = _grouped(emits.size, second)
    unsettled = np.where(second >= 0, 2, 1)
    least = np.full(emits.size, -1, np.int64)
    heap = [(1, node) for node in range(emits.size) if emits[node]]
    while len(heap) > 0:
        words, node = heapq.heappop(heap)
        if least[node] >= 0:
            continue
        least[node] = words
        for start, place in ((first_start, first_place), (second_start, second_place)):
            for rule in place[start[node] : start[node + 1]]:
                unsettled[rule] -= 1
                if unsettled[rule] == 0 and least[left[rule]] < 0:
                    total = least[first[rule]]
                    if second[rule] >= 0:
                        total += least[second[rule]]
                    heapq.heappush(heap, (min(total, UNBOUNDED), left[rule]))
    return least


@njit(cache=True)
def longest_yields(left, first, second, emits, component):
    """The largest number of words of each nonterminal, UNBOUNDED where it is that or more: (N,) int64.

    A nonterminal that derives itself is unbounded, as a cycle, never of unary rules alone, adds words. The others are sums
    over children; `component` has the `strong_components` of all edges of the rules.

    >>> left, first, second = np.array([0, 1, 2]), np.array([1, 3, 2]), np.array([1, -1, 3])
    >>> emits = np.array([False, False, False, True])
    >>> longest_yields(left, first, second, emits, np.array([2, 1, 3, 0])).tolist()
    [2, 1, 1073741824, 1]
    """
    longest = emits.astype(np.int64)
    for rule in range(left.size):
        same = component[first[rule]] == component[left[rule]]
        if same or (second[rule] >= 0 and component[second[rule]] == component[left[rule]]):
            longest[left[rule]] = UNBOUNDED
    start, place = _grouped(emits.size, left)
    for node in np.argsort(component):  # children first
        for rule in place[start[node] : start[node + 1]]:
            total = longest[first[rule]]
            if second[rule] >= 0:
                total += longest[second[rule]]
            longest[node] = max(longest[node], min(total, UNBOUNDED))
    return longest
