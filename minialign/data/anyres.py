"""AnyRes, LLaVA-1.6's way with pictures of any shape: which tiles are cut, which features kept.

A picture is fitted into the best of a few resolutions ("pinpoints"), padded and cut into square
tiles; the whole picture, squashed into one more tile, goes first. What the padding covered is left
out again, and every row of patches ends in a learned `image_newline`. All sizes are (height,
width). Numerics as in transformers' LLaVA-NeXT.
"""

from math import ceil

import torch
from PIL import Image
from torch import Tensor

from minialign.model.masks import NEWLINE

Size = tuple[int, int]
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def best_resolution(size: Size, pinpoints: tuple[Size, ...] = PINPOINTS) -> Size:
    """The pinpoint that keeps most of the picture's own pixels.

    Among those the least wasteful, then the first.
    """
    height, width = size
    merits = []
    for best_height, best_width in pinpoints:
        scale = min(best_width / width, best_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = best_height * best_width - kept
        merits.append((kept, -wasted))
    return pinpoints[merits.index(max(merits))]


def fitted_size(size: Size, best: Size) -> Size:
    """The picture's size after scaling it into `best`."""
    (height, width), (best_height, best_width) = size, best
    if best_width / width < best_height / height:
        return min(ceil(height * (best_width / width)), best_height), best_width
    return best_height, min(ceil(width * (best_height / height)), best_width)


def parts(
    image: Image.Image, tile: int, pinpoints: tuple[Size, ...] = PINPOINTS
) -> list[Image.Image]:
    """The parts of an RGB picture: square tiles of `tile` pixels, row by row."""
    size = (image.height, image.width)
    best_height, best_width = best_resolution(size, pinpoints)
    height, width = fitted_size(size, (best_height, best_width))
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)

    canvas = Image.new("RGB", (best_width, best_height))  # padded with black, before normalising
    canvas.paste(fitted, ((best_width - width) // 2, (best_height - height) // 2))
    corners = [(x, y) for y in range(0, best_height, tile) for x in range(0, best_width, tile)]
    return [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]


def kept_patches(size: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of a (rows, columns) patch grid that are not padding."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, columns - padding)


def packing(
    size: Size, tile: int, side: int, pinpoints: tuple[Size, ...] = PINPOINTS
) -> tuple[int, Tensor]:
    """How many patches all tiles have, and what the picture's N image tokens stand for.

    The latter are indices into those patches, or NEWLINE, (N,): first the squashed whole, then the
    parts' patches row by row. `side` is the number of patches along a tile's edge.
    """
    best = best_resolution(size, pinpoints)
    down, across = best[0] // tile, best[1] // tile
    whole = side * side
    patches = whole * (1 + down * across)

    grid = torch.arange(whole, patches).view(down, across, side, side)
    grid = grid.permute(0, 2, 1, 3).reshape(down * side, across * side)  # (rows, columns)
    grid = grid[kept_patches(size, (down * side, across * side))]
    lines = torch.cat([grid, torch.full((len(grid), 1), NEWLINE)], dim=1)
    return patches, torch.cat([torch.arange(whole), lines.flatten()])
