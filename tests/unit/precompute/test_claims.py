"""A claim has one owner, and dies with it."""

import multiprocessing
import os

from kandinsky_dist.precompute.claims import claimed, owner


def test_a_claim_has_one_owner_whose_name_is_in_the_file(tmp_path):
    path = tmp_path / "work" / "3"
    with claimed(path) as is_mine:
        assert is_mine
        assert path.read_text() == f"{owner()}\n"
        with claimed(path) as is_mine_too:
            assert not is_mine_too
        assert path.exists()
    assert not path.exists()


def test_work_that_was_finished_between_the_look_and_the_lock_is_not_claimed(tmp_path, monkeypatch):
    """Whoever opened the file before its owner removed it gets the lock of a file that is no more."""
    from kandinsky_dist.precompute import claims

    path, lock = tmp_path / "3", claims._is_locked

    def lock_after_the_owner_is_done(descriptor: int) -> bool:
        path.unlink()
        return lock(descriptor)

    monkeypatch.setattr(claims, "_is_locked", lock_after_the_owner_is_done)
    with claimed(path) as is_mine:
        assert not is_mine


def test_a_folder_that_the_last_one_removed_is_made_again(tmp_path):
    with claimed(tmp_path / "gone" / "3"):
        (tmp_path / "gone" / "3").unlink()
        (tmp_path / "gone").rmdir()
    with claimed(tmp_path / "gone" / "3") as is_mine:
        assert is_mine


def test_the_claim_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "3"
    ready, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(path, child))
    process.start()
    assert ready.recv() == "held"
    with claimed(path) as is_mine:
        assert not is_mine
    os.kill(process.pid, 9)
    process.join()
    assert path.exists()
    with claimed(path) as is_mine:
        assert is_mine


def _hold(path, ready) -> None:
    with claimed(path) as is_mine:
        assert is_mine
        ready.send("held")
        ready.recv()
