"""From a run's checkpoint to a diffusers pipeline folder."""

from pathlib import Path

import yaml
from torch import Tensor

from kandinsky_dist.checkpoint.layout import COMMIT, CONFIG, CheckpointReader
from kandinsky_dist.checkpoint.manager import checkpoints_of, newest_whole
from kandinsky_dist.errors import CheckpointError
