"""Levers that are always on in training, and how a bench case does without one to see what it is worth."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from kandinsky_dist.models.architectures import MAX_TOKENS


@dataclass(frozen=True)
class Replacement:
    """A name of a module, and what stands in for it where the lever is off."""

    module: str
    name: str
    by: Any

    @property
    def is_there(self) -> bool:
        """Whether there is something to replace."""
        return find_spec(self.module) is not None and hasattr(importlib.import_module(self.module), self.name)


# All of a lever's places are known here, so that one that gets another name takes the rung off the ladder and
# does not leave half a lever on.
LEVERS: dict[str, tuple[Replacement, ...]] = {
    "pad-free text": (
        Replacement("kandinsky_dist.models.prior", "make_pad_free", lambda module: None),
        Replacement("kandinsky_dist.train.build", "token_multiple", lambda config: None),
        Replacement("kandinsky_dist.data.rows", "_without_shared_padding", lambda *tokens: tokens),
        # FLOPs are counted at these lengths, and diffusers' own forward takes 77 tokens only.
        Replacement("kandinsky_dist.train.cost", "LENGTHS", (MAX_TOKENS,)),
    ),
}
"""Lever -> what turns it off."""


def is_there(lever: str) -> bool:
    """Whether this version has the lever, whole."""
    return all(replacement.is_there for replacement in LEVERS[lever])


def turn_off(lever: str) -> None:
    """Takes the lever from everything that this process builds from now on, and its children too."""
    for replacement in LEVERS[lever]:
        setattr(importlib.import_module(replacement.module), replacement.name, replacement.by)
