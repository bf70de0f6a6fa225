"""What the ranks of the compilation tests run."""

import json
from pathlib import Path
from typing import Any

from torch._dynamo.utils import counters

from kandinsky_dist.config import loader
from kandinsky_dist.faults.preempt import StopRequest
from kandinsky_dist.models.compiled import num_graphs
from kandinsky_dist.runtime.process import joined
from kandinsky_dist.train.trainer import Trainer


def train_and_count(stage: str, cases: dict[str, dict[str, Any]], out: Path) -> None:
    """Trains one run after another; OUT/NAME_rank_N.json says what was compiled for each.

    "graphs": compiled until the end of each step; "cached": taken from the compile cache; "made": not.
    """
    with joined() as process:
        for name, settings in cases.items():
            before, graphs = num_graphs(), []
            counters["inductor"].clear()
            counters["aot_autograd"].clear()
            layer = loader.Layer("test", settings)
            trainer = Trainer(loader.load(stage, None, [layer]), process, StopRequest())
            trainer.write_audit = lambda _, graphs=graphs, before=before: graphs.append(num_graphs() - before)
            trainer.run()
            found = {
                "graphs": graphs,
                "cached": counters["inductor"]["fxgraph_cache_hit"]
                + counters["aot_autograd"]["autograd_cache_hit"],
                "made": counters["inductor"]["fxgraph_cache_miss"]
                + counters["aot_autograd"]["autograd_cache_miss"],
            }
            (out / f"{name}_rank_{process.rank}.json").write_text(json.dumps(found))
