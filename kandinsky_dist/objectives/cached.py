"""Text states that were computed in advance, as the model takes them.

Shapes: B samples, L text states, D width.
"""

from torch import Tensor
from torch.nn.functional import pad

from kandinsky_dist.models.architectures import MAX_TOKENS


def at_full_length(states_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Text states and their mask with zeros, which the mask hides, up to CLIP's full length.

    diffusers' PriorTransformer knows its tokens by their places and takes exactly so many. A forward that
    gathers the places of the tokens that are there takes the states as they are, and needs none of this.
    """
    num_missing = MAX_TOKENS - states_BLD.shape[1]
    return pad(states_BLD, (0, 0, 0, num_missing)), pad(mask_BL, (0, num_missing))
