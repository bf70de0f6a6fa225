"""What records of benches say to the model of time: a device's computing, and links between ranks."""

from statistics import median

from kandinsky_dist.bench.record import Record
from kandinsky_dist.config.schema import Config
from kandinsky_dist.errors import DataError
from kandinsky_dist.estimate.links import MeasuredLinks
from kandinsky_dist.estimate.time import Compute


def compute_of(record: Record, config: Config) -> Compute:
    """Computing time of one device, from a record of `bench train` or `bench scaling`.

    Of each micro-batch size the quickest row counts: a record has slower ways to do the same beside it.

    Raises:
        DataError: no row in it is of one rank that trains this stage from this kind of samples.
    """
    source, common = config.data.source, record.setting.get("settings", {})
    quickest: dict[int, float] = {}
    for row in record.rows:
        settings = {**common, **row.get("settings", {})}
        is_like = row.get("stage") == config.stage and settings.get("data.source", "raw") == source
        if not is_like or row.get("way") != "ours" or row["world_size"] > 1 or not row["step_seconds"]:
            continue
        size = row["micro_batch_size"]
        seconds = median(row["step_seconds"]) * size / row["global_batch_size"]
        quickest[size] = min(seconds, quickest.get(size, seconds))
    if not quickest:
        raise DataError(
            f"the record of {record.command!r} has no row of one rank that trains the {config.stage} with "
            f"data.source={source}: kandinsky-dist bench train makes one"
        )
    return Compute.fitted(list(quickest.items()), f"{record.device}, {record.date}")


def links_of(record: Record) -> MeasuredLinks:
    """Latency and bandwidth of the ranks that a record of `bench comm` was taken with.

    Raises:
        DataError: it is of another case.
    """
    if record.case != "comm":
        raise DataError(f"a record of bench {record.case} knows no collectives: give one of bench comm")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in record.rows:
        if row["kind"] == "collective":
            points.setdefault(row["collective"], []).append((row["num_bytes"], median(row["seconds"])))
    return MeasuredLinks.fitted(points, record.setting["world_size"])
