"""Properties of a grammar's rules: those of their shape, in time linear in the rules (but for sorting and a heap), and chains.

A graph over nonterminals 0 .. N - 1 consists of edges `parent` and `child`, (E,) integers each: a rule has an edge from its
left side to each nonterminal on its right. Rules are `left`, `first` and `second`, (R,) integers each; `second` is -1 in a
unary rule. `emits`, (N,) bool, says which nonterminals have a rule to a word.

`scipy.sparse.csgraph` has components and searches too, but importing them takes 0.2 s, a fifth of a generator's start.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit

# A number of words that is this large, or infinite.
UNBOUNDED = 1 << 30


class Chains(NamedTuple):
    """What follows all chains of unary rules within a cell: value[parent] += probability value[child], step by step in order.

    The steps reversed, with parents and children exchanged, do the same for outside values. Without a cycle the steps are the
    unary rules, children's own rules first. With maxima in place of sums there are other steps.
    """

    steps: np.ndarray  # (K, 2) int32, parent and child; the same in a step that multiplies
    probability: np.ndarray  # (K,) float64; above 1 where a cycle repeats more than once on average
    visits: np.ndarray  # (N,) float64, expected number of A in all chains that begin with A, 1 where A is on no cycle


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

    Nonterminals that derive each other have the same: UNBOUNDED if a binary rule is among the rules that lead back to them,
    since each use adds words; cycles of unary rules alone add none. `component` has the `strong_components` of all edges.

    >>> left, first, second = np.array([0, 1, 2]), np.array([1, 3, 2]), np.array([1, -1, 3])
    >>> emits = np.array([False, False, False, True])
    >>> longest_yields(left, first, second, emits, np.array([2, 1, 3, 0])).tolist()
    [2, 1, 1073741824, 1]
    """
    longest = np.zeros(emits.size, np.int64)  # of components, of which there are at most N
    for node in range(emits.size):
        longest[component[node]] |= emits[node]
    for rule in range(left.size):
        own = component[left[rule]]
        if second[rule] >= 0 and (component[first[rule]] == own or component[second[rule]] == own):
            longest[own] = UNBOUNDED
    start, place = _grouped(emits.size, left)
    for node in np.argsort(component):  # children first
        for rule in place[start[node] : start[node + 1]]:
            total = longest[component[first[rule]]]
            if second[rule] >= 0:
                total += longest[component[second[rule]]]
            longest[component[node]] = max(longest[component[node]], min(total, UNBOUNDED))
    return longest[component]


def unary_cycles(unary: np.ndarray, component: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each component with a cycle: its nonterminals, (k,), and its unary rules, (r,), ascending."""
    owner = component[unary[:, 0]]
    cyclic = np.flatnonzero(owner == component[unary[:, 1]])
    cyclic = cyclic[np.argsort(owner[cyclic], kind="stable")]
    for rules in np.split(cyclic, np.flatnonzero(np.diff(owner[cyclic])) + 1) if len(cyclic) else ():
        yield np.unique(unary[rules]), rules


def cycle_matrix(members: np.ndarray, edges: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """U[A, B], the expected number of B on the right of A in the edges (E, 2), (k, k) float64; `members`, (k,), ascending."""
    matrix = np.zeros((len(members), len(members)))
    np.add.at(matrix, tuple(np.searchsorted(members, edges).T), probability)
    return matrix


def unary_chains(
    unary: np.ndarray, probability: np.ndarray, component: np.ndarray, leaving: np.ndarray
) -> tuple[Chains, Chains]:
    """The chains of unary rules for sums and for maxima.

    With U[A, B] = P(A -> B) within a component, the sums over all chains are (I - U)^-1. It is applied as the factors of
    Gaussian elimination (Grassmann, Taksar and Heyman 1985): 1 - U[A, A] is added up from the rules that leave A, so that
    nothing is subtracted and each factor is exact up to rounding, however close to 1 the spectral radius of U is. A cycle never
    raises a probability, so the best chain is acyclic: the closure of Floyd and Warshall with maxima of products.

    Args:
        unary: (U, 2) integers, left side and child; probability (U,) float64.
        component: (N,) int64, `strong_components` of the unary rules.
        leaving: (N,) float64, the probability of all rules of a nonterminal but the unary ones to its own component.
    """
    visits = np.ones(len(component))
    order = np.argsort(component[unary[:, 0]], kind="stable")
    crossing = order[component[unary[order, 0]] != component[unary[order, 1]]]
    # A component's steps come after the rules that leave it, whose children's components are lower.
    parts = [[(component[unary[crossing, 0]], unary[crossing], probability[crossing])] for _ in range(2)]
    for members, rules in unary_cycles(unary, component):
        matrix = cycle_matrix(members, unary[rules], probability[rules])
        sums, visits[members] = _elimination(matrix.copy(), leaving[members].copy())
        for middle in range(len(members)):
            matrix = np.maximum(matrix, np.outer(matrix[:, middle], matrix[middle]))
        np.fill_diagonal(matrix, 0.0)
        maxima = np.column_stack([*np.nonzero(matrix), matrix[matrix > 0.0]])
        for part, steps in zip(parts, (sums, maxima), strict=True):
            part.append((np.full(len(steps), component[members[0]]), members[steps[:, :2].astype(np.int64)], steps[:, 2]))
    results = []
    for part in parts:
        owner, steps, factor = (np.concatenate(column) for column in zip(*part, strict=True))
        order = np.argsort(owner, kind="stable")
        results.append(Chains(steps[order].astype(np.int32), factor[order], visits))
    return results[0], results[1]


def _elimination(matrix: np.ndarray, leaving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(I - matrix)^-1 as steps (K, 3), parent, child and factor, and its diagonal; `matrix` (k, k), `leaving` (k,) are lost."""
    forward = []
    back = []
    closure = np.eye(len(matrix))
    for node in range(len(matrix) - 1, -1, -1):
        stays = 1.0 / (matrix[node, :node].sum() + leaving[node])  # 1 / (1 - matrix[node, node])
        forward.append((node, node, matrix[node, node] * stays))  # x + (stays - 1) x
        forward += [(parent, node, matrix[parent, node]) for parent in range(node)]
        matrix[node, :node] *= stays
        leaving[node] *= stays
        back += [(node, child, matrix[node, child]) for child in range(node)]
        matrix[:node, :node] += np.outer(matrix[:node, node], matrix[node, :node])
        leaving[:node] += matrix[:node, node] * leaving[node]
        closure[node] *= stays
        closure[:node] += np.outer(matrix[:node, node], closure[node])
    for node in range(1, len(matrix)):
        closure[node] += matrix[node, :node] @ closure[:node]
    steps = np.array(forward + back[::-1])
    return steps[steps[:, 2] > 0.0], np.diag(closure)
