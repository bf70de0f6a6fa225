"""A process that was held while it saved finds the folder taken over, and leaves what lies there."""

from pathlib import Path

import pytest
import torch

from kandinsky_dist.checkpoint import writer
from kandinsky_dist.checkpoint.files import COMMIT, checkpoints_of, damage, folder_name
from kandinsky_dist.checkpoint.layout import RankTensors, RunState
from kandinsky_dist.checkpoint.writer import Writer
from kandinsky_dist.errors import FencedError
from kandinsky_dist.faults.fence import Fence
from kandinsky_dist.runtime.process import joined


def write(run_dir: Path, process, step: int, fence: Fence | None = None) -> None:
    """Step's checkpoint by the start that has `fence`, or by the next start."""
    if fence is None:
        fence = Fence(run_dir)
        fence.join(fence.take(1))
    tensors = RankTensors({"w@0/master": torch.full((1,), float(fence.start))}, {"w": 1})
    made = Writer(run_dir / "checkpoints", process, keep=2, identity={}, config_yaml="", fence=fence)
    made.write(lambda: tensors, RunState(step))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("held_in", "made_again"),
    [
        pytest.param("write_state", 3, id="before the folder has its name"),
        pytest.param("sync", 3, id="before the folder is finished"),
        pytest.param("remove", 4, id="among the older checkpoints"),
    ],
)
def test_what_a_newer_start_has_written_meanwhile_stays(monkeypatch, tmp_path, held_in, made_again):
    newest = tmp_path / "checkpoints" / folder_name(made_again)
    written = {}
    go_on = getattr(writer, held_in)

    def hold(*arguments):
        result = go_on(*arguments)
        monkeypatch.setattr(writer, held_in, go_on)
        write(tmp_path, process, made_again)
        unfinished = newest.with_name(f"{folder_name(made_again + 1)}.{fence.start + 1}.tmp")
        unfinished.mkdir()
        (unfinished / "rank_00000.safetensors").write_bytes(b"half")
        written.update(content(newest) | content(unfinished))
        return result

    with joined() as process:
        fence = Fence(tmp_path)
        fence.join(fence.take(1))
        write(tmp_path, process, 1, fence)
        write(tmp_path, process, 2, fence)
        monkeypatch.setattr(writer, held_in, hold)
        with pytest.raises(FencedError):
            write(tmp_path, process, 3, fence)
    assert (newest / COMMIT).exists()
    left = content(tmp_path / "checkpoints")
    assert {path: left.get(path) for path in written} == written
    assert checkpoints_of(tmp_path / "checkpoints")[0] == newest
    assert damage(newest) is None
