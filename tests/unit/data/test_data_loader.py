import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress

import pytest
import torch
from data_tars import sample, write_tar

from kandinsky_dist.data.batch import Batch
from kandinsky_dist.data.dataset import ShardDataset
from kandinsky_dist.data.indexing.index import index_shards
from kandinsky_dist.data.loader import MAX_DEATHS, THREADS_PER_PROCESS, Loader
from kandinsky_dist.data.order import Order
from kandinsky_dist.data.rows import Views
from kandinsky_dist.data.storage import LocalStorage
from kandinsky_dist.errors import DataError
from kandinsky_dist.telemetry.meter import Meter


def loader(manifest, *, rank=0, world_size=1, num_workers=0, global_batch_size=8, micro_batch_size=2):
    views = Views(clip_size=None, resolution=4, tokenize=None, captions=None, seed=0)
    return Loader(
        ShardDataset(Order([manifest], seed=1), views, LocalStorage(manifest)),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        device="cpu",
    )


def positions(steps, count):
    taken = [[batch.positions_B.tolist() for batch in step] for step in itertools.islice(steps, count)]
    steps.close()
    return taken


def test_ranks_share_the_global_batch_in_order(make_corpus):
    manifest = make_corpus([5, 6])
    alone = positions(loader(manifest).steps(16), 3)
    assert alone == [
        [[16 + 8 * step + 2 * micro + n for n in (0, 1)] for micro in range(4)] for step in range(3)
    ]
    ranks = [positions(loader(manifest, rank=rank, world_size=2).steps(16), 3) for rank in (0, 1)]
    assert ranks[1][0] == [[17, 19], [21, 23]]
    for step in range(3):
        together = sorted(position for rank in ranks for micro in rank[step] for position in micro)
        assert together == [position for micro in alone[step] for position in micro]


def test_workers_change_nothing(make_corpus):
    manifest = make_corpus([7, 4])
    before = torch.random.get_rng_state()
    runs = []
    for num_workers in (0, 1, 2, 2 * THREADS_PER_PROCESS + 1):
        steps = loader(manifest, num_workers=num_workers).steps(8)
        runs.append([batch for step in itertools.islice(steps, 3) for batch in step])
        steps.close()
    for run in runs[1:]:
        for mine, first in zip(run, runs[0], strict=True):
            assert mine.keys == first.keys
            assert torch.equal(mine.pixels_BCHW, first.pixels_BCHW)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_resuming_is_arithmetic(make_corpus):
    manifest = make_corpus([9])
    whole = positions(loader(manifest).steps(0), 5)
    assert positions(loader(manifest).steps(24), 2) == whole[3:]


def test_waiting_is_counted(make_corpus):
    data = loader(make_corpus([4]))
    assert data.data_wait_seconds == 0
    steps = data.steps(0)
    next(steps)
    first = data.data_wait_seconds
    next(steps)
    assert 0 < first < data.data_wait_seconds
    steps.close()


def test_what_is_waited_for_a_slow_source_is_the_meters_data_wait():
    """The source blocks on an event that is set after a known wait: the figures can be told beforehand."""
    is_asked, may_answer = threading.Event(), threading.Event()

    class Slow:
        num_samples = None

        def batches(self, lists, num_threads):
            for positions in lists:
                is_asked.set()
                may_answer.wait()
                yield Batch(torch.tensor(positions), [""] * len(positions), None, None, None, None)

    def hold() -> None:
        is_asked.wait()
        held.append(time.monotonic())
        time.sleep(0.1)  # what the loader must count, whatever else delays it
        held.append(time.monotonic())
        may_answer.set()

    held: list[float] = []
    data = Loader(
        Slow(), global_batch_size=2, micro_batch_size=2, rank=0, world_size=1, num_workers=0, device="cpu"
    )
    releaser = threading.Thread(target=hold)
    releaser.start()
    steps = data.steps(0)
    before = time.monotonic()
    meter = Meter(2, torch.device("cpu"))
    next(steps)  # waits for the event
    after = time.monotonic()
    releaser.join()
    waited = data.data_wait_seconds
    assert held[1] - held[0] <= waited <= after - before
    next(steps)  # the event is set: nothing to wait for but the batch itself
    meter.tick()
    meter.tick()
    fraction = meter.report(data.data_wait_seconds)["data_wait_fraction"]
    assert waited / (time.monotonic() - before) <= fraction <= 1
    steps.close()


@pytest.mark.parametrize(("num_samples", "world_size"), [(1, 1), (5, 2), (8, 2), (9, 3), (100, 4)])
def test_held_out_weighs_every_sample_once(make_corpus, num_samples, world_size):
    manifest = make_corpus([6, 5])
    lengths, total, seen = set(), 0.0, []
    for rank in range(world_size):
        data = loader(manifest, rank=rank, world_size=world_size, global_batch_size=24, micro_batch_size=2)
        batches = list(data.held_out(num_samples))
        lengths.add(len(batches))
        for batch, weights_B in batches:
            assert weights_B.dtype == torch.float32
            assert weights_B.shape == batch.positions_B.shape == (2,)
            total += weights_B.sum().item()
            seen += batch.positions_B[weights_B > 0].tolist()
    expected = min(num_samples, 11)
    assert lengths == {-(-expected // (2 * world_size))}
    assert total == expected
    assert sorted(seen) == list(range(expected))


def test_held_out_with_workers(make_corpus):
    batches = list(loader(make_corpus([3]), num_workers=2).held_out(3))
    assert [weights_B.tolist() for _, weights_B in batches] == [[1, 1], [1, 0]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_error_is_the_same_line_from_a_worker(tmp_path, num_workers):
    write_tar(tmp_path / "a.tar", sample(0, png=b"broken") + sample(1, png=b"broken"))
    data = loader(index_shards(str(tmp_path), progress=False), num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        for _ in data.steps(0):
            pass
    assert str(caught.value).startswith("16 samples in a row cannot be used, at position 0, first a.tar:0000")
    assert "\n" not in str(caught.value)


def workers_of_this_process():
    # A thread may end between the look at its name and the look into it.
    found = []
    for task in os.listdir("/proc/self/task"):
        with (
            suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{task}/children") as file,
        ):
            found += [int(pid) for pid in file.read().split()]
    return found


def alive_workers(before):
    return [pid for pid in workers_of_this_process() if pid not in before]


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_repeated(make_corpus, caplog):
    manifest = make_corpus([9, 4])
    expected = positions(loader(manifest).steps(0), 6)
    before = set(workers_of_this_process())
    steps = loader(manifest, num_workers=2 * THREADS_PER_PROCESS).steps(0)
    found = [[batch.positions_B.tolist() for batch in next(steps)]]
    workers = alive_workers(before)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    # The death arrives here as SIGCHLD and must not raise: this could be the middle of a checkpoint.
    os.waitid(os.P_PID, workers[0], os.WEXITED | os.WNOWAIT)
    sum(range(1000))
    found += [[batch.positions_B.tolist() for batch in next(steps)] for _ in range(5)]
    steps.close()
    assert found == expected
    (line,) = caplog.messages
    assert line.startswith(f"a data worker (process {workers[0]}) was killed by SIGKILL")
    assert line.endswith("replaced, with nothing lost or repeated")
    assert not alive_workers(before)


class Deadly:
    """A source whose worker is killed at a certain batch, each time it comes there."""

    num_samples = None
    in_process = False

    def __init__(self, dataset, deadly):
        self.dataset = dataset
        self.deadly = deadly

    def batches(self, lists, num_threads):
        for batch in self.dataset.batches(lists, num_threads):
            if self.deadly in batch.positions_B.tolist():
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


# torch opens files to see whether any are left, and the next death interrupts it there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_die_again_and_again_are_one_line(make_corpus, caplog):
    data = loader(make_corpus([4]), num_workers=1)
    data.source = Deadly(data.source, deadly=13)
    seen = []

    def train():
        for step in data.steps(0):
            seen.extend(position for batch in step for position in batch.positions_B.tolist())

    with pytest.raises(DataError, match=r"^a data worker \(process \d+\) was killed by SIGKILL; .*\Z"):
        train()
    assert seen == list(range(8))  # whole steps only
    assert len(caplog.messages) >= MAX_DEATHS - 1  # batches on their way die with a worker, and come again


def test_workers_leave_stopping_to_the_trainer(make_corpus):
    before = set(workers_of_this_process())
    steps = loader(make_corpus([4]), num_workers=2).steps(0)
    first = next(steps)
    workers = [pid for pid in workers_of_this_process() if pid not in before]
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    for _ in range(5):
        assert len(next(steps)) == len(first)
    steps.close()
    assert not set(workers) & set(workers_of_this_process())


def test_a_program_that_forgets_its_loader_ends(make_corpus):
    """Workers ignore SIGTERM, with which multiprocessing would end them at exit."""
    root = make_corpus([4]).root
    program = f"""
        from kandinsky_dist.data import catalogue, dataset, loader, order, rows, storage

        corpus = order.Order([catalogue.read_manifest({str(root)!r})], seed=0)
        views = rows.Views(clip_size=None, resolution=4, tokenize=None, captions=None, seed=0)
        data = dataset.ShardDataset(corpus, views, storage.LocalStorage(corpus.manifest))
        steps = loader.Loader(
            data, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1, num_workers=2, device="cpu"
        ).steps(0)
        print(len(next(steps)[0]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", "")
