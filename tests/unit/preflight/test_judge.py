import json
from dataclasses import replace

import pytest

from kandinsky_dist.preflight.judge import MAX_SKEW_SECONDS, problems_of
from kandinsky_dist.preflight.node import Report

VERSIONS = {"python": "3.11.7", "torch": "2.11.0", "driver": "580.1"}
GPUS = ("H100 80 GiB",) * 8
NODES = ("n0", "n1", "n2")
ALIKE = [Report(node, VERSIONS, GPUS, 0.1) for node in NODES]


def said(reports, words=None, nodes=NODES):
    return [str(problem) for problem in problems_of(nodes, reports, words or {})]


def test_nodes_alike_have_no_problem():
    assert said(ALIKE) == []


def test_reports_travel_as_one_line_and_other_lines_are_none():
    report = replace(ALIKE[0], problems=(("disk\nfull", 1),))
    assert "\n" not in report.to_line()
    assert Report.of_line(report.to_line()) == report
    for line in ("", "slurmstepd: error", "[]", "{}", "3", json.dumps({"node": "n0"})):
        assert Report.of_line(line) is None


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_odd_one_is_named_whichever_it_is(odd):
    reports = list(ALIKE)
    reports[odd] = replace(ALIKE[odd], versions={**VERSIONS, "torch": "2.9.1"})
    assert said(reports) == [f"n{odd}: torch is 2.9.1, on the other nodes 2.11.0; install the same one"]
    reports[odd] = replace(ALIKE[odd], gpus=GPUS[:7])
    (line,) = said(reports)
    assert line.startswith(f"n{odd}: its GPUs are 7 x H100 80 GiB, on the other nodes 8 x H100 80 GiB;")


def test_of_two_nodes_the_second_is_the_odd_one():
    reports = [ALIKE[0], replace(ALIKE[1], versions={**VERSIONS, "torch": "2.9.1"})]
    assert said(reports, nodes=NODES[:2])[0].startswith("n1: torch is 2.9.1")
    assert said(reports[::-1], nodes=NODES[:2]) == said(reports, nodes=NODES[:2]), "whichever came first"


@pytest.mark.parametrize("seconds", [MAX_SKEW_SECONDS + 1, -MAX_SKEW_SECONDS - 1])
def test_a_clock_that_is_wrong_is_named(seconds):
    (line,) = said([*ALIKE[:2], replace(ALIKE[2], clock_ahead_seconds=0.1 + seconds)])
    assert line == f"n2: its clock is {seconds:+.0f} s from the other nodes'; synchronise it"
    assert not said([*ALIKE[:2], replace(ALIKE[2], clock_ahead_seconds=0.1 + seconds / 2)])


def test_a_node_without_a_report_is_named_with_its_last_words():
    lines = said(ALIKE[:1], {"n1": "execve(): No such file or directory"})
    assert lines[0].startswith("n1: did not report (execve(): No such file or directory)")
    assert lines[1].startswith("n2: did not report (it said nothing)")


def test_a_nodes_own_problems_carry_their_exit_codes():
    reports = [replace(ALIKE[0], problems=(("shard 3 is missing", 65), ("run.dir is full", 1))), *ALIKE[1:]]
    assert [(item.node, item.text, item.exit_code) for item in problems_of(NODES, reports, {})] == [
        ("n0", "shard 3 is missing", 65),
        ("n0", "run.dir is full", 1),
    ]


def test_a_node_whose_gpu_is_broken_is_named_for_that_alone():
    reports = [replace(ALIKE[0], gpus=(), problems=(("GPU 3 computes a wrong product", 78),)), *ALIKE[1:]]
    assert said(reports) == ["n0: GPU 3 computes a wrong product"]
