"""Make single-fault edits of the package and see whether the test suite catches them.

    python tests/tools/mutate.py list --seed 1 --count 40
    python tests/tools/mutate.py show 'data/plan.py:57:12 < -> <='
    python tests/tools/mutate.py run --seed 1 --count 40 --out edits.jsonl -- --deselect tests/unit/x.py

`run` edits a copy of the checkout, never the checkout itself. In the copy it runs the test files that reach
the edited module (see changed.py), nearest first and tier by tier, up to the first failure. A failing test
counts only if it passes without the edit. The file OUT gets one JSON record an edit; edits that have a record
are not run again. Outcomes:

    caught      a test fails
    hung        the time limit ended, and no test had ended for half of it; counts as caught
    survived    all selected tests pass, or there are none
    unfinished  the time limit ended while tests were still passing; run again with a larger --limit
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when this file is started as a program

from tools.changed import PACKAGE, ROOT, TIERS, ImportGraph, Selected, select
from tools.draws import draw
from tools.operators import Edit, edits_of
from tools.trial import Copy, Trial

ROOMS = "data,checkpoint,parallel,train,faults,config,submit,models"
CAUGHT = ("caught", "hung")


def source_of(root: Path, edit: Edit) -> bytes:
    """Return the bytes of the file that an edit is for."""
    return (root / PACKAGE / edit.path).read_bytes()


def show(root: Path, wanted: str) -> str:
    """Return the diff of the edit with an id; ends the program with one line where there is none."""
    path = wanted.partition(":")[0]
    file = root / PACKAGE / path
    if not file.is_file():
        sys.exit(f"{wanted}: no such file: {file}")
    for edit in edits_of(path, file.read_bytes()):
        if edit.id == wanted:
            return edit.diff(file.read_bytes())
    sys.exit(f"{wanted}: no such edit of {file}: `list` prints the ids of some")


def recorded(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (id, diff) -> record of the edits that were run before."""
    if not out.exists():
        return {}
    records = map(json.loads, out.read_text().splitlines())
    return {(record["id"], record["diff"]): record for record in records}


def grouped(selected: list[Selected], tiers: list[str]) -> list[tuple[str, list[str]]]:
    """Return the test files of one pytest run each: of every tier the nearest ones, then the others.

    Most edits are caught by the nearest tests, which import far less than all tests together.
    """
    groups = []
    for tier in tiers:
        found = [one for one in selected if one.tier == tier]
        for is_nearest in (True, False):
            files = [one.path for one in found if (one.distance == found[0].distance) == is_nearest]
            if files:
                groups.append((tier, files))
    return groups


def run(root: Path, edits: list[Edit], out: Path, tiers: list[str], limit: float, words: list[str]) -> int:
    """Run the tests on each edit that has no record yet; returns 0 if none survived, otherwise 1."""
    done = recorded(out)
    keys = [(edit.id, edit.diff(source_of(root, edit))) for edit in edits]
    if any(key not in done for key in keys):
        with Copy(root) as copy, out.open("a") as file:
            graph = ImportGraph(copy.folder)
            trial = Trial(copy, limit_seconds=limit, words=words)
            for number, (edit, key) in enumerate(zip(edits, keys, strict=True), 1):
                if key in done:
                    continue
                path = f"{PACKAGE}/{edit.path}"
                selected = select(graph, [path])
                source = source_of(copy.folder, edit)
                record = {
                    "id": edit.id,
                    "room": edit.path.partition("/")[0],
                    "operator": edit.operator,
                    "diff": key[1],
                    **trial.run(copy.folder / path, source, edit.applied(source), grouped(selected, tiers)),
                    "num_selected": {tier: sum(one.tier == tier for one in selected) for tier in tiers},
                }
                done[key] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(f"{number:3} {record['outcome']:10} {record['seconds']:5} s  {edit.id}  {record['by']}")
                sys.stdout.flush()
    return report([done[key] for key in keys])


def report(records: list[dict[str, Any]]) -> int:
    """Print the edits that were not caught and the numbers; returns 0 if none survived, otherwise 1."""
    for record in records:
        if record["outcome"] not in CAUGHT:
            print(f"{record['outcome']}: {record['id']}\n{record['diff']}")
    counts = {
        outcome: sum(record["outcome"] == outcome for record in records)
        for outcome in ("caught", "hung", "survived", "unfinished")
    }
    caught = counts["caught"] + counts["hung"]
    print(
        f"caught {caught} of {len(records)} ({counts['hung']} by time-out), survived {counts['survived']}, "
        f"unfinished {counts['unfinished']}"
    )
    return int(counts["survived"] > 0)


def main(argv: list[str]) -> int:
    """Run one command and return its exit code: 0, or 1 if an edit survived."""
    words = list(itertools.dropwhile(lambda word: word != "--", argv))
    parser = argparse.ArgumentParser(
        prog="mutate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments after -- go to pytest, after this program's own -x -q -n 2.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--seed", type=int, default=0, help="edits are drawn by it (default: 0)")
    drawn.add_argument("--count", type=int, default=40, help="number of edits (default: 40)")
    drawn.add_argument("--rooms", default=ROOMS, help=f"folders below {PACKAGE}/, in turn (default: {ROOMS})")
    commands.add_parser("list", parents=[shared, drawn], help="print the drawn edits with their diffs")
    showing = commands.add_parser("show", parents=[shared], help="print the diff of one edit")
    showing.add_argument("id", help="as `list` prints it, in quotes")
    running = commands.add_parser("run", parents=[shared, drawn], help="run the tests on each edit")
    running.add_argument(
        "--out", type=Path, required=True, help="JSON lines, one an edit; continued if it is there"
    )
    running.add_argument(
        "--only", type=int, action="append", metavar="K", help="the K-th edit only, from 1; repeatable"
    )
    running.add_argument(
        "--tier", default="unit,process", help=f"of {','.join(TIERS)} (default: unit,process)"
    )
    running.add_argument("--limit", type=float, default=900, help="seconds for one edit (default: 900)")
    arguments = parser.parse_args(argv[: len(argv) - len(words)])
    root = arguments.root.resolve()
    if arguments.command == "show":
        print(show(root, arguments.id))
        return 0
    rooms = arguments.rooms.split(",")
    for room in rooms:
        if not (root / PACKAGE / room).is_dir():
            parser.error(f"--rooms {room}: no such folder below {root / PACKAGE}")
    edits = draw(root, rooms, arguments.seed, arguments.count)
    if arguments.command == "list":
        for edit in edits:
            print(f"{edit.id}\n{edit.diff(source_of(root, edit))}")
        return 0
    tiers = arguments.tier.split(",")
    if unknown := set(tiers) - set(TIERS):
        parser.error(f"--tier {','.join(sorted(unknown))}: choose from {','.join(TIERS)}")
    if arguments.only:
        if not all(0 < number <= len(edits) for number in arguments.only):
            parser.error(f"--only {arguments.only}: numbers from 1 to {len(edits)}")
        edits = [edits[number - 1] for number in arguments.only]
    return run(root, edits, arguments.out, tiers, arguments.limit, words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
