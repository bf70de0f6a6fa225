"""How fast the nodes of a job reach each other: all together, and each with both of its neighbours.

An all-reduce is as fast as the slowest of its nodes and does not say which that is; a node that is slow with
either neighbour, while they are not slow with their others, is the one.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

from kandinsky_dist.errors import KandinskyError

MESSAGE_BYTES = 64 * 2**20
"""Long enough that latency does not count."""
REPEATS = 3
"""Of which the fastest counts: whoever was late is no slower for it."""
MEETING_SECONDS = 120
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Links:
    """What a node measured, in GB/s (10^9 bytes a second).

    Attributes:
        node: its name.
        all_reduce: bus bandwidth over all nodes, as `bench comm` counts it.
        pairs: what it sends to a neighbour while it gets as much; one or two of them.
    """

    node: str
    all_reduce: float
    pairs: tuple[float, ...]

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of_line(cls, line: str) -> "Links | None":
        """What a line holds, None for any other line."""
        try:
            found = json.loads(line)
            return cls(found["node"], float(found["all_reduce"]), tuple(map(float, found["pairs"])))
        except (ValueError, KeyError, TypeError):
            return None


def partner(index: int, turn: int, num_nodes: int) -> int | None:
    """Whom a node talks to in turn 0 or 1: of a ring every edge once, and of an odd number some nobody."""
    other = index ^ 1 if turn == 0 else ((index + 1) ^ 1) - 1
    if num_nodes % 2 == 0:
        return other % num_nodes
    return other if 0 <= other < num_nodes else None


def measure(node: str, environ: Mapping[str, str]) -> Links:
    """Measures, as the task of this node among those of all nodes.

    Args:
        node: its name.
        environ: SLURM_PROCID and SLURM_NTASKS, and RENDEZVOUS=host:port, where nobody listens yet.
    """
    import torch
    import torch.distributed as dist

    from kandinsky_dist.runtime.process import Process, leave

    index, num_nodes = int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"])
    host, _, port = environ["RENDEZVOUS"].rpartition(":")
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    store = dist.TCPStore(host, int(port), num_nodes, index == 0, timedelta(seconds=MEETING_SECONDS))
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=store,
        rank=index,
        world_size=num_nodes,
        timeout=timedelta(seconds=MEETING_SECONDS),
        device_id=device if has_gpu else None,
    )
    sent, got = (torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def seconds(exchange: Callable[[], None]) -> float:
        fastest = float("inf")
        for _ in range(REPEATS + 1):
            dist.barrier()
            start = time.monotonic()
            exchange()
            if has_gpu:
                torch.cuda.synchronize()
            fastest = min(fastest, time.monotonic() - start)
        return fastest

    def talk_to(other: int | None) -> None:
        if other is not None:
            both = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, got, other)]
            for request in dist.batch_isend_irecv(both):
                request.wait()

    # As much crosses each node's link as bench.collectives.bus_factor says.
    crossing = 2 * (num_nodes - 1) / num_nodes * MESSAGE_BYTES
    values = sent.view(torch.float32)
    all_reduce = crossing / seconds(lambda: dist.all_reduce(values)) / 1e9
    pairs = []
    for turn in range(2):
        other = partner(index, turn, num_nodes)
        taken = seconds(lambda other=other: talk_to(other))  # type: ignore[misc]
        if other is not None:
            pairs.append(MESSAGE_BYTES / taken / 1e9)
    dist.barrier()
    leave(Process(index, 0, num_nodes, device), KandinskyError.exit_code)
    return Links(node, all_reduce, tuple(pairs))
