import pytest

from kandinsky_dist.preflight.judge import slow_links
from kandinsky_dist.preflight.network import Links, partner

NODES = ("n0", "n1", "n2", "n3")
FAST = [Links(node, 40.0, (45.0, 44.0)) for node in NODES]


@pytest.mark.parametrize("num_nodes", range(2, 9))
def test_pairs_are_the_edges_of_a_ring(num_nodes):
    edges = []
    for turn in range(2):
        for index in range(num_nodes):
            other = partner(index, turn, num_nodes)
            if other is not None:
                assert partner(other, turn, num_nodes) == index != other
                edges.append(tuple(sorted((index, other))))
    ring = {tuple(sorted((index, (index + 1) % num_nodes))) for index in range(num_nodes)}
    if num_nodes % 2:
        ring -= {(0, num_nodes - 1)}
    assert set(edges) == ring
    assert all(any(index in edge for edge in edges) for index in range(num_nodes)), "nobody is left out"


def test_nodes_above_the_floor_are_left_alone():
    assert slow_links(NODES, FAST, 39.0) == []


def test_the_node_that_is_slow_with_both_neighbours_is_named():
    links = [Links("n0", 9.0, (45.0, 44.0)), Links("n1", 9.0, (44.0, 10.0)), Links("n2", 9.0, (10.0, 11.0)),
             Links("n3", 9.0, (11.0, 45.0))]  # fmt: skip
    (problem,) = slow_links(NODES, links, 39.0)
    assert str(problem) == (
        "n2: exchanges 11 GB/s at most, KANDINSKY_MIN_GB_S=39; "
        "repair its link, or leave it out with --exclude"
    )
    assert problem.exit_code == 78


def test_slow_nodes_are_named_in_the_order_of_the_nodes():
    links = [Links(node, 9.0, (10.0, 11.0)) for node in reversed(NODES)]
    assert [problem.node for problem in slow_links(NODES, links, 39.0)] == list(NODES)


def test_where_no_node_is_slow_the_network_between_them_is():
    links = [Links(node, 9.0, (45.0, 44.0)) for node in NODES]
    (problem,) = slow_links(NODES, links, 39.0)
    assert "reaches 9 GB/s, KANDINSKY_MIN_GB_S=39, though no node is slow" in str(problem)


def test_a_node_that_did_not_measure_is_named():
    (problem,) = slow_links(NODES, [*FAST[:1], *FAST[2:]], 39.0)
    assert problem.node == "n1"


def test_lines_of_other_programs_are_none():
    assert Links.of_line(FAST[0].to_line()) == FAST[0]
    for line in ("", "[]", "{}", "3", '{"node": "n0"}', '{"node": "n0", "all_reduce": 1, "pairs": 3}'):
        assert Links.of_line(line) is None
