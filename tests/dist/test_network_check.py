"""The measurement of a job's network, by several processes."""

import os
import socket

import pytest
from helpers.forked import run_on_ranks

from kandinsky_dist.preflight.network import Links, measure

pytestmark = pytest.mark.dist


def _measured(port: int) -> Links:
    rank = os.environ["RANK"]
    environ = {"SLURM_PROCID": rank, "SLURM_NTASKS": "3", "RENDEZVOUS": f"127.0.0.1:{port}"}
    return measure(f"n{rank}", environ)


def test_three_nodes_measure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = run_on_ranks(_measured, 3, port)
    assert [links.node for links in found] == ["n0", "n1", "n2"]
    assert [len(links.pairs) for links in found] == [1, 2, 1], "of three in a row the middle one has two"
    assert all(links.all_reduce > 0 and min(links.pairs) > 0 for links in found)
