"""The U-Net, a trained peer of NRRN.

Source: Ronneberger, Fischer & Brox, "U-Net: Convolutional networks for biomedical image segmentation" (2015).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from nrrn_pipeline.network.architecture import Architecture, DenoisingNetwork


class UNet(DenoisingNetwork):
    """Down through `units` poolings and up again, joined to the maps of the way down; the output is added to the input.

    On every grid, down and up: twice 3x3 convolution, batch normalisation, ReLU. Down: maximum over 2x2, twice the maps
    (C, 2C, ...: 16C after four). Up: transposed convolution of 2x2 at stride 2, which puts each coarse voxel on four of
    its own; with the poolings all repeats every 2^units voxels. Last a 1x1 convolution C -> 1, of the noise that is
    added. Batch normalisation and zero padding, where the original has neither, are as in nearly all U-Nets since.

    Slices whose sides are no multiples of 2^units are continued at the bottom and right by their last row and column,
    then cropped. A tile that begins at a multiple of 2^units and ends where its slice ends is continued alike.
    """

    def __init__(self, units: int = 4, channels: int = 64, inputs: str = "mean") -> None:
        super().__init__()
        self.architecture = Architecture("unet", units, channels, inputs)
        maps = [channels * 2**level for level in range(units + 1)]
        self.down = nn.ModuleList(_two_convolutions(a, b) for a, b in pairwise([1, *maps]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, kernel_size=2, stride=2) for c in maps[:-1])
        self.joined = nn.ModuleList(_two_convolutions(2 * c, c) for c in maps[:-1])
        self.last = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """(n, 1, y, x) slices -> (n, 1, y, x) estimates of the clean slices."""
        height, width = image.shape[2:]
        below, beside = (-length % self.architecture.grid for length in (height, width))
        h = functional.pad(image, (0, beside, 0, below), mode="replicate")
        kept: list[Tensor] = []
        for level, convolutions in enumerate(self.down):
            h = convolutions(functional.max_pool2d(h, 2) if level else h)
            kept.append(h)
        kept.pop()
        for up, convolutions in zip(reversed(self.up), reversed(self.joined), strict=True):
            h = convolutions(torch.cat([kept.pop(), up(h)], dim=1))
        noise: Tensor = self.last(h)[:, :, :height, :width]
        return image + noise


def _two_convolutions(maps_in: int, maps: int) -> nn.Sequential:
    """Twice 3x3 convolution, batch normalisation (whose own shift makes a bias needless), ReLU."""
    layers: list[nn.Module] = []
    for a in (maps_in, maps):
        layers += [
            nn.Conv2d(a, maps, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(maps),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
