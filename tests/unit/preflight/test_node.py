import json

from helpers.objective import configuration

from kandinsky_dist.cli import main
from kandinsky_dist.preflight.node import examine


def test_a_fit_machine_has_no_problem_and_nothing_is_left_behind(tiny_models, small_corpus, tmp_path):
    folder = tmp_path / "not" / "yet"
    config = configuration("decoder", f"run.dir={folder}", models=tiny_models, corpus=small_corpus)
    report = examine(config, {"SLURMD_NODENAME": "n7"})
    assert report.node == "n7"
    assert report.problems == ()
    assert {"python", "torch", "deepspeed", "driver"} <= report.versions.keys()
    assert report.clock_ahead_seconds is not None
    assert abs(report.clock_ahead_seconds) < 60
    assert list(tmp_path.iterdir()) == []


def test_nodes_look_at_all_shards_together(tiny_models, small_corpus, tmp_path):
    shards = tmp_path / "train"
    shards.mkdir()
    for path in (small_corpus / "train").iterdir():
        (shards / path.name).write_bytes(path.read_bytes())
    lost = sorted(shards.glob("*.tar"))[1]
    lost.unlink()
    config = configuration(
        "prior", f"data.shards={shards}", f"run.dir={tmp_path}", models=tiny_models, corpus=small_corpus
    )
    found = [examine(config, {"SLURM_NODEID": str(i), "SLURM_NNODES": "2"}).problems for i in range(2)]
    assert found[0] == ()
    ((text, code),) = found[1]
    assert lost.name in text
    assert code == 65


def test_the_command_says_what_is_wrong_and_ends_with_its_code(tiny_models, small_corpus, tmp_path, capsys):
    words = ["preflight", "prior", f"--model.prior={tiny_models / 'prior'}", f"--run.dir={tmp_path}"]
    assert main([*words, f"--data.shards={small_corpus / 'train'}"]) == 0
    assert "preflight: 1 node fit, 0 GPUs" in capsys.readouterr().err
    assert main([*words, f"--data.shards={tmp_path / 'none'}"]) == 65
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "data.shards=" in said[0]
    assert main([*words, f"--data.shards={tmp_path / 'none'}", "--this-node"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"][0][1] == 65
