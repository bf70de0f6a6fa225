"""Text states that were computed in advance, as the model takes them.

Shapes: B samples, L text states, D width.
"""

from torch import Tensor
from torch.nn.functional import pad

NUM_TEXT_STATES = 77


def at_full_length(states_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Text states and their mask with zeros, which the mask hides, up to 77 tokens.

    diffusers' PriorTransformer knows its tokens by their places and takes exactly 77. A forward that gathers
    the places of the tokens that are there takes the states as they are, and needs none of this.
    """
    num_missing = NUM_TEXT_STATES - states_BLD.shape[1]
    return pad(states_BLD, (0, 0, 0, num_missing)), pad(mask_BL, (0, num_missing))
