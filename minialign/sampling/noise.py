"""Eq. 8-9: the diffusion noise of BDHS_noise and of POVID's distortion, on pixels."""

import numpy as np
import torch
from PIL import Image


def noise_level(steps: int) -> float:
    """abar_N of Eq. 8-9: the product of 1 - beta_k over k = 1..N, by App. E.1's schedule."""
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    beta = torch.sigmoid(-6 + 12 * k / 1000) * (0.5e-2 - 1e-5) + 1e-5
    return float(torch.prod(1 - beta))


def add_noise(image: Image.Image, steps: int, generator: torch.Generator) -> Image.Image:
    """Eq. 9: x~ = sqrt(abar_N) x + sqrt(1 - abar_N) eps on raw [0, 1] pixels, before resizing."""
    if steps == 0:
        return image
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")) / 255.0)
    abar = noise_level(steps)
    noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    # Differs from the paper: clamped to [0, 1]. In POVID's code bytes wrap around.
    noisy = (abar**0.5 * pixels + (1 - abar) ** 0.5 * noise).clamp(0, 1)
    return Image.fromarray((noisy * 255).round().to(torch.uint8).numpy())


def noise_of_seed(image: Image.Image, steps: int, seed: int) -> Image.Image:
    """The noisy picture that a pair's `mask_seed` stands for: sampler and report draw the same."""
    return add_noise(image, steps, torch.Generator().manual_seed(seed + 1))  # not the mask's stream
