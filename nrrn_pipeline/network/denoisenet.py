"""DenoiseNet, a trained peer of NRRN.

Source: Remez, Litany, Giryes & Bronstein, "Deep class-aware image denoising" (2017) and "Class-aware
fully-convolutional Gaussian and Poisson denoising" (2018).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from nrrn_pipeline.network.architecture import Architecture, DenoisingNetwork


class DenoiseNet(DenoisingNetwork):
    """Convolutions in a row, each of which adds its share to the noise estimate. We read the papers so:

        h = input;  noise = 0
        L - 1 times:  h = W_l * h        3x3, C maps, zero padding 1, with bias
                      noise = noise + h[0]        before the nonlinearity, so that a share has either sign
                      h = relu(h)        all C maps go on
        estimate = centre slice + noise + W_L * h        W_L: C -> 1, no nonlinearity

    L = 20 and C = 64 are published. No pooling and no normalisation layer. Glorot's initial weights, biases 0: the
    shares begin small, and the network near the identity.
    """

    def __init__(self, units: int = 20, channels: int = 64, inputs: str = "channels") -> None:
        super().__init__()
        self.architecture = Architecture("denoisenet", units, channels, inputs)
        maps = [3 if inputs == "channels" else 1, *[channels] * (units - 1), 1]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in pairwise(maps))
        for layer in self.layers.children():
            assert isinstance(layer, nn.Conv2d)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """(n, 1, y, x) slices, or (n, 3, y, x) triplets -> (n, 1, y, x) estimates of the clean (centre) slices."""
        middle = image.shape[1] // 2
        estimate, h = image[:, middle : middle + 1], image
        for layer in self.layers[:-1]:
            h = layer(h)
            estimate = estimate + h[:, :1]
            h = torch.relu_(h)
        last: Tensor = self.layers[-1](h)
        return estimate + last
