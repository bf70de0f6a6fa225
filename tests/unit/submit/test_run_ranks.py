import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([75, 75], 75),
        ([75, -15], 75),  # torchrun ended the slower one
        ([75, 1], 1),  # a crash is no clean stop
        ([1, 75], 1),
        ([1, 78], 78),  # the message for people explains the other rank's failure
        ([65, -15, 1], 65),
        ([-9, 1], 137),
        ([-15], 143),
    ],
)
def test_one_exit_status_for_all_ranks(codes, status):
    spec = importlib.util.spec_from_file_location("run_ranks", REPOSITORY / "launch" / "run_ranks.py")
    assert spec
    assert spec.loader
    run_ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_ranks)
    assert run_ranks.exit_status(codes) == status
