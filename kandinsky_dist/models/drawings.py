"""Pictures drawn from a seed: coloured shapes on white, for measuring what encoders make of images."""

import torch
from torch import Tensor

NUM_SHAPES_MAX = 4


def draw_pictures(num_pictures: int, size: int, seed: int) -> Tensor:
    """Draws one to four discs, boxes, triangles and striped boxes a picture.

    Args:
        num_pictures: B.
        size: side, pixels.
        seed: the same seed draws the same pictures.

    Returns:
        uint8 (B, 3, size, size).
    """
    generator = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    y_HW, x_HW = torch.meshgrid(axis, axis, indexing="ij")
    pictures = torch.full((num_pictures, 3, size, size), 255, dtype=torch.uint8)
    for picture_CHW in pictures:
        num_shapes = int(torch.randint(1, NUM_SHAPES_MAX + 1, (), generator=generator))
        for _ in range(num_shapes):
            numbers = torch.rand(9, generator=generator)
            kind = int(numbers[0] * 4)
            center_x, center_y = (numbers[1:3] * 1.4 - 0.7).tolist()
            radius = 0.15 + 0.5 * float(numbers[3])
            angle = float(numbers[4]) * 2 * torch.pi
            color_3 = (numbers[5:8] * 255).to(torch.uint8)
            cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
            u_HW = ((x_HW - center_x) * cos + (y_HW - center_y) * sin) / radius
            v_HW = ((y_HW - center_y) * cos - (x_HW - center_x) * sin) / radius
            inside_HW = _inside(kind, u_HW, v_HW, stripes=2 + 6 * float(numbers[8]))
            picture_CHW[:, inside_HW] = color_3[:, None]
    return pictures


def _inside(kind: int, u_HW: Tensor, v_HW: Tensor, stripes: float) -> Tensor:
    """Pixels that a shape covers, in its own coordinates, where it has radius 1."""
    box_HW = torch.maximum(u_HW.abs(), v_HW.abs()) < 0.8
    if kind == 0:
        return u_HW.square() + v_HW.square() < 1
    if kind == 1:
        return box_HW
    if kind == 2:
        return (v_HW > -0.5) & (v_HW + 1.7 * u_HW.abs() < 1)
    return box_HW & ((u_HW * stripes).floor() % 2 == 0)
