"""Components, reachability and yield lengths against naive fixed points on small random graphs and rules."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from pcfg.engine.rule_graph import longest_yields, reachable, shortest_yields, strong_components


def naive_yields(left, first, second, emits, rounds):
    """Sets of all numbers of words up to `rounds` that each nonterminal derives, by adding rule after rule."""
    yields = [{1} if emit else set() for emit in emits]
    for _ in range(rounds * len(emits)):
        for parent, b, c in zip(left, first, second, strict=True):
            sums = yields[b] if c < 0 else {x + y for x in yields[b] for y in yields[c]}
            yields[parent] |= {words for words in sums if words <= rounds}
    return yields


@pytest.mark.parametrize("seed", range(30))
def test_components_are_scipys_and_come_children_first(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    parent, child = rng.integers(0, size, (2, int(rng.integers(0, 2 * size))))
    component = strong_components(size, parent, child)
    graph = csr_array((np.ones(len(parent)), (parent, child)), shape=(size, size))
    number, expected = connected_components(graph, connection="strong")
    assert len(set(zip(component.tolist(), expected.tolist(), strict=True))) == number == component.max() + 1
    assert (component[parent] >= component[child]).all()
    for root in range(size):
        reached = breadth_first_order(graph, root, return_predecessors=False)
        np.testing.assert_array_equal(np.flatnonzero(reachable(component, parent, child, root)), np.sort(reached))


@pytest.mark.parametrize("seed", range(30))
def test_yields_are_those_of_a_fixed_point(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 8))
    left, first, second = rng.integers(0, size, (3, int(rng.integers(0, 2 * size))))
    unary = rng.random(len(left)) < 0.3
    unary &= first > left  # unary rules have no cycles
    second = np.where(unary, -1, second)
    emits = rng.random(size) < 0.4
    yields = naive_yields(left, first, second, emits, 16)
    shortest = shortest_yields(left, first, second, emits)
    for words, lengths in zip(shortest.tolist(), yields, strict=True):
        assert words == min(lengths, default=words) and (lengths or words == -1 or words > 16)
    # Grammars have a yield for every nonterminal; the largest is defined for these.
    derives = (shortest >= 0)[left] & (shortest >= 0)[first] & ((second < 0) | (shortest >= 0)[second])
    left, first, second = left[derives], first[derives], second[derives]
    parent = np.append(left, left[second >= 0])
    child = np.append(first, second[second >= 0])
    component = strong_components(size, parent, child)
    longest = longest_yields(left, first, second, emits, component)
    for symbol in np.flatnonzero(shortest >= 0):
        assert longest[symbol] == max(yields[symbol], default=0) or longest[symbol] > 16
