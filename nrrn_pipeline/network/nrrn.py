"""The noise reconstruction and removal network, whole.

Source: Giannios, Chaurasia, Thibault et al., "Noise Reconstruction & Removal Network: A New Architecture to Denoise
FIB-SEM Images". One branch takes the centre slice x and one neighbour to an estimate of the clean centre slice; the
denoised slice is the mean of the branches of both neighbours. C channels, L building units, every convolution 3x3:

    h_n = relu(W0 * neighbour)        h_c = relu(W0 * centre)
    L times:  h_n = tanh(W1 * h_n)                             W1 shared by all units
              h_c = unit(h_c, h_n)                             gates and synthesizer
              x = x + attention(h_c)                           one more share of the noise removed
              h_c[0] = tanh(x)                                 feedback
    x = x + attention(W2 * relu(h_c))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nrrn_pipeline.network.architecture import Architecture, DenoisingNetwork

# Slices of a triplet (0 is z-1, 1 is z, 2 is z+1) that serve as neighbours, by the number of images used.
NEIGHBOURS = {3: (0, 2), 2: (0,), 1: (1,)}


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3 convolution, stride 1, zero padding 1, with bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


def noise_attention(h: Tensor) -> Tensor:
    """(n, C, y, x) hidden state -> (n, 1, y, x) noise: the first channel, weighted by the strongest response."""
    return h[:, :1] * torch.sigmoid(h.amax(dim=1, keepdim=True))


class BuildingUnit(nn.Module):
    """Update gate, reset gate and synthesizer of one unit; the convolutions of all three stand side by side.

        u = sigmoid(Wu * h_c + Vu * h_n)        r = sigmoid(Wr * h_c + Vr * h_n)
        c = tanh(Wc * h_c + r o (Vc * h_n))     next h_c = u o h_n + (1 - u) o c

    The paper's eq. 1 exchanges u and 1 - u; the authors' tool does it so, and its checkpoints load here.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.centre = conv3x3(channels, 3 * channels)  # Wu, Wr, Wc
        self.neighbour = conv3x3(channels, 3 * channels)  # Vu, Vr, Vc

    def forward(self, h_c: Tensor, h_n: Tensor, v: Tensor) -> Tensor:
        """Centre state, neighbour state (n, C, y, x) and v = V * h_n (n, 3C, y, x) -> the next centre state."""
        w_update, w_reset, w_candidate = self.centre(h_c).chunk(3, dim=1)
        v_update, v_reset, v_candidate = v.chunk(3, dim=1)
        update = torch.sigmoid(w_update + v_update)
        reset = torch.sigmoid(w_reset + v_reset)
        candidate = torch.tanh(w_candidate + reset * v_candidate)
        return torch.lerp(candidate, h_n, update)


class NRRN(DenoisingNetwork):
    """The network of the paper's Fig. 1 with `units` building units (L) of `channels` feature maps (C)."""

    def __init__(self, units: int = 4, channels: int = 64) -> None:
        super().__init__()
        self.architecture = Architecture("nrrn", units, channels, "neighbours")
        self.channels = channels
        self.first = conv3x3(1, channels)  # W0
        self.advance = conv3x3(channels, channels)  # W1
        self.units = nn.ModuleList(BuildingUnit(channels) for _ in range(units))
        self.last = conv3x3(channels, channels)  # W2, left as the framework initialises it
        self._initialise()

    def forward(self, neighbour: Tensor, centre: Tensor, estimates: bool = False) -> Tensor:
        """One branch: (n, 1, y, x) neighbour and centre -> (n, 1, y, x) estimate of the clean centre.

        With `estimates`, (n, L+1, y, x): the estimate after every building unit, then the final one (Fig. 5).
        """
        every = list(self._estimates(centre, self._neighbour_states(neighbour)))
        return torch.cat(every, dim=1) if estimates else every[-1]

    def estimate(self, triplet: Tensor) -> Tensor:
        """(n, 3, y, x) normalised triplets -> (n, 1, y, x): the mean of both neighbours' branches; differentiable."""
        before, centre, after = triplet.split(1, dim=1)
        both: Tensor = self(torch.cat([before, after]), torch.cat([centre, centre]))
        return torch.stack(both.chunk(2)).mean(dim=0)

    @torch.inference_mode()
    def denoise(self, stack: Tensor, images: int = 3) -> Tensor:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate of all slices but the first and the last.

        Each slice's neighbour states are computed once and serve both triplets that it is a neighbour in; three
        slices' are held at a time. `images`: 3 is the paper's method; 2 uses the slice before only; 1 the slice alone.
        """
        result = torch.empty_like(stack[1:-1])
        states: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for z in range(len(result)):
            neighbours = [z + offset for offset in NEIGHBOURS[images]]
            for i in neighbours:
                if i not in states:
                    states[i] = list(self._neighbour_states(stack[None, None, i]))
            branches = zip(*(states[i] for i in neighbours), strict=True)
            joined = ((torch.cat([h for h, _ in unit]), torch.cat([v for _, v in unit])) for unit in branches)
            for estimate in self._estimates(stack[None, None, z + 1], joined):  # noqa: B007
                pass  # only the last one counts here, and holding none before it saves memory
            result[z] = estimate.mean(dim=(0, 1))
            states.pop(z, None)
        return result

    @torch.inference_mode()
    def after_each_unit(self, stack: Tensor) -> Tensor:
        """(z+2, y, x) normalised stack -> (L+1, z, y, x): estimates after every unit, then the final one (Fig. 5)."""
        triplets = stack.unfold(0, 3, 1).movedim(-1, 1)  # (z, 3, y, x)
        estimates = []
        for triplet in triplets:
            before, centre, after = triplet[:, None, None]
            both = self(torch.cat([before, after]), torch.cat([centre, centre]), estimates=True)
            estimates.append(both.mean(dim=0))
        return torch.stack(estimates, dim=1)

    def _neighbour_states(self, neighbour: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For every unit h_n (n, C, y, x) and V * h_n (n, 3C, y, x): all that a branch needs of its neighbour."""
        h_n = torch.relu(self.first(neighbour))
        for unit in self.units:
            h_n = torch.tanh(self.advance(h_n))
            yield h_n, cast("BuildingUnit", unit).neighbour(h_n)

    def _estimates(self, centre: Tensor, states: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The branch's estimate (n, 1, y, x) after every unit, then the final one; one centre serves n neighbours."""
        x = centre
        h_c = torch.relu(self.first(centre))
        for unit, (h_n, v) in zip(self.units, states, strict=True):
            h_c = unit(h_c, h_n, v)
            x = x + noise_attention(h_c)
            yield x
            h_c = torch.cat([torch.tanh(x), h_c[:, 1:]], dim=1)
        yield x + noise_attention(self.last(torch.relu(h_c)))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Orthogonal weights, scaled by the gain of the nonlinearity that follows."""
        gain = nn.init.calculate_gain
        gates: tuple[Literal["sigmoid", "tanh"], ...] = ("sigmoid", "sigmoid", "tanh")
        nn.init.orthogonal_(self.first.weight, gain("relu"))
        nn.init.orthogonal_(self.advance.weight, gain("tanh"))
        edges = [0, self.channels, 2 * self.channels, 3 * self.channels]
        for unit in self.units:
            for layer in unit.children():
                for (start, stop), name in zip(pairwise(edges), gates, strict=True):
                    nn.init.orthogonal_(cast("nn.Conv2d", layer).weight[start:stop], gain(name))
