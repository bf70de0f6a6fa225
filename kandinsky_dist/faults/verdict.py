"""What is left of a hang for people: the verdict, and from each rank that can the place where it stood.

hangs/start_00003/verdict.json                  which ranks did not arrive; its first judge wrote it
hangs/start_00003/rank_00001.txt                stacks of all threads
hangs/start_00003/rank_00001.collectives.json   the collectives it took part in last
"""

import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from kandinsky_dist.faults.hang import Hang
from kandinsky_dist.runtime.disk import write_whole
from kandinsky_dist.runtime.flight import recorded_collectives

VERDICT = "verdict.json"


class Verdicts:
    """The verdict on one start of a run, as one rank sees it.

    Args:
        run_dir: the run's folder.
        start: number of the start.
        rank: that looks.
    """

    def __init__(self, run_dir: Path, start: int, rank: int) -> None:
        self.folder = run_dir / "hangs" / f"start_{start:05d}"
        self._rank = rank

    def is_there(self) -> bool:
        """Whether some rank has judged."""
        return (self.folder / VERDICT).exists()

    def line(self) -> str:
        """What was judged."""
        try:
            return str(json.loads((self.folder / VERDICT).read_text())["line"])
        except (OSError, ValueError, KeyError, TypeError):
            return "hang"

    def give(self, hang: Hang) -> bool:
        """Makes a verdict known to all ranks; returns whether it is the first one."""
        mine = self.folder / f".{VERDICT}.{self._rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(mine, json.dumps(asdict(hang)))
            os.link(mine, self.folder / VERDICT)  # fails if there is one
        except FileExistsError:
            return False
        except OSError as error:  # better said twice than never
            print(f"{self.folder}: {error.strerror}", file=sys.stderr)
        finally:
            mine.unlink(missing_ok=True)
        return True

    def has_stacks(self, rank: int) -> bool:
        """Whether a rank has written down where it stands."""
        return self._stacks(rank).exists()

    def write_stacks(self, place: str) -> None:
        """Writes down what every thread of this process is in, and its last collectives.

        Args:
            place: in the words of the run.
        """
        path = self._stacks(self._rank)
        try:
            if collectives := recorded_collectives():
                path.with_suffix(".collectives.json").write_bytes(collectives)
            temporary = path.with_suffix(".tmp")
            with open(temporary, "w") as file:
                print(place, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            print(f"no stacks of rank {self._rank}: {error}", file=sys.stderr)

    def _stacks(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.txt"
