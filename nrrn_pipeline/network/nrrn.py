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

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nrrn_pipeline.network.architecture import Architecture, DenoisingNetwork

# How many slices further on the centres lie that a slice is a neighbour of, by the number of images used.
SERVES = {3: (1, -1), 2: (1,), 1: (0,)}


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3 convolution, stride 1, zero padding 1, with bias."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


def noise_attention(h: Tensor, dim: int = 1) -> Tensor:
    """(n, C, y, x) hidden state -> (n, 1, y, x) noise: the first channel, weighted by the strongest response."""
    return h.narrow(dim, 0, 1) * torch.sigmoid(h.amax(dim=dim, keepdim=True))


Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def unit_step(x: Tensor, w: Tensor, h_n: Tensor, v: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """All of a building unit but its convolutions; differentiable. `dim`: that of the channels, in all of them.

    x (n, 1, y, x) estimate, w = W * h_c and v = V * h_n (n, 3C, y, x), h_n (n, C, y, x) -> the next x and h_c.

        u = sigmoid(Wu * h_c + Vu * h_n)        r = sigmoid(Wr * h_c + Vr * h_n)
        c = tanh(Wc * h_c + r o (Vc * h_n))     next h_c = u o h_n + (1 - u) o c

    The paper's eq. 1 exchanges u and 1 - u; the authors' tool does it so, and its checkpoints load here.
    """
    w_update, w_reset, w_candidate = w.chunk(3, dim=dim)
    v_update, v_reset, v_candidate = v.chunk(3, dim=dim)
    update = torch.sigmoid(w_update + v_update)
    reset = torch.sigmoid(w_reset + v_reset)
    candidate = torch.tanh(w_candidate + reset * v_candidate)
    h_c = torch.lerp(candidate, h_n, update)
    x = x + noise_attention(h_c, dim)
    rest = h_c.narrow(dim, 1, h_c.shape[dim] - 1)
    return x, torch.cat([torch.tanh(x).to(h_c.dtype), rest], dim=dim)


def unit_step_in_place(x: Tensor, w: Tensor, h_n: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the memory of w, which is lost; for inference, where memory is what takes the time."""
    channels = h_n.shape[1]
    gates, candidate = w[:, : 2 * channels], w[:, 2 * channels :]
    gates.add_(v[:, : 2 * channels]).sigmoid_()
    update, reset = gates.split(channels, dim=1)
    candidate.addcmul_(reset, v[:, 2 * channels :]).tanh_()
    h_c = torch.lerp(candidate, h_n, update)
    x = x + noise_attention(h_c)
    h_c[:, :1] = torch.tanh(x)
    return x, h_c


class BuildingUnit(nn.Module):
    """The convolutions of one unit: update gate, reset gate and synthesizer stand side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.centre = conv3x3(channels, 3 * channels)  # Wu, Wr, Wc
        self.neighbour = conv3x3(channels, 3 * channels)  # Vu, Vr, Vc


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
        """Branches: (n, 1, y, x) neighbours and centres -> (n, 1, y, x) estimates of the clean centres.

        Or a multiple of n neighbours: the centres, in their order, are each one's again. With `estimates`, (n, L+1, y,
        x): the estimate after every building unit, then the final one (Fig. 5).
        """
        times = (len(neighbour) // len(centre), 1, 1, 1)
        w = self._seen(centre).repeat(times)
        every = list(self._estimates(centre.repeat(times), w, self._neighbour_states(neighbour), unit_step))
        return torch.cat(every, dim=1) if estimates else every[-1]

    def estimate(self, triplet: Tensor) -> Tensor:
        """(n, 3, y, x) normalised triplets -> (n, 1, y, x): the mean of both neighbours' branches; differentiable."""
        before, centre, after = triplet.split(1, dim=1)
        both: Tensor = self(torch.cat([before, after]), centre)
        return torch.stack(both.chunk(2)).mean(dim=0)

    @torch.inference_mode()
    def denoise(self, stack: Tensor, images: int = 3, step: Step = unit_step_in_place) -> Tensor:
        """(z+2, y, x) normalised stack -> (z, y, x) estimate of all slices but the first and the last.

        Slice by slice as neighbours: each serves both triplets that it is a neighbour in, unit by unit, so its states
        are computed once, and one unit's are held at a time. `images`: 3 is the paper's method; 2 uses the slice before
        only; 1 the slice alone. `step`: the same as unit_step, compiled perhaps.
        """
        last, estimates = len(stack) - 2, torch.zeros_like(stack[1:-1])
        seen: dict[int, Tensor] = {}  # until their second neighbour comes
        for i in range(len(stack)):
            centres = [i + apart for apart in SERVES[images] if 1 <= i + apart <= last]
            if not centres:
                continue
            seen |= {z: self._seen(stack[None, None, z]) for z in centres if z not in seen}
            every = self._estimates(
                stack[centres, None],
                torch.cat([seen[z] for z in centres]),  # held by nobody else: its memory is free after the first unit
                self._neighbour_states(stack[None, None, i]),
                step,
            )
            seen.pop(i + min(SERVES[images]), None)
            for estimate in every:  # noqa: B007
                pass  # only the last one counts here, and holding none before it saves memory
            for z, found in zip(centres, estimate, strict=True):
                estimates[z - 1] += found[0]
        return estimates.div_(len(SERVES[images]))

    @torch.inference_mode()
    def after_each_unit(self, stack: Tensor) -> Tensor:
        """(z+2, y, x) normalised stack -> (L+1, z, y, x): estimates after every unit, then the final one (Fig. 5)."""
        triplets = stack.unfold(0, 3, 1).movedim(-1, 1)  # (z, 3, y, x)
        estimates = []
        for triplet in triplets:
            before, centre, after = triplet[:, None, None]
            both = self(torch.cat([before, after]), centre, estimates=True)
            estimates.append(both.mean(dim=0))
        return torch.stack(estimates, dim=1)

    def _seen(self, centre: Tensor) -> Tensor:
        """What the first unit sees of centres (n, 1, y, x): W * h_c (n, 3C, y, x), which both neighbours share."""
        w: Tensor = self._unit(0).centre(self._entered(centre))
        return w

    def _entered(self, slices: Tensor) -> Tensor:
        """(n, 1, y, x) -> (n, C, y, x) states, in the weights' precision; estimates stay in that of the slices."""
        return torch.relu(self.first(slices.to(self.first.weight.dtype)))

    def _neighbour_states(self, neighbour: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For every unit h_n (n, C, y, x) and V * h_n (n, 3C, y, x): all that a branch needs of its neighbour."""
        h_n = self._entered(neighbour)
        for unit in range(len(self.units)):
            h_n = torch.tanh(self.advance(h_n))
            yield h_n, self._unit(unit).neighbour(h_n)

    def _estimates(self, x: Tensor, w: Tensor, states: Iterator[tuple[Tensor, Tensor]], step: Step) -> Iterator[Tensor]:
        """The branches' estimates (n, 1, y, x) after every unit, then the final ones.

        x: centres (n, 1, y, x); w: what the first unit sees of them; states: of n neighbours, or of one for all.
        """
        h = w  # what a unit sees of the centres, then their state: never both, nor the neighbours' of two units
        del w
        for unit in range(len(self.units)):
            h_n, v = next(states)
            if unit > 0:
                h = self._unit(unit).centre(h)
            x, h = step(x, h, h_n, v)
            del h_n, v
            yield x
        yield x + noise_attention(self.last(torch.relu(h)))

    def _unit(self, number: int) -> BuildingUnit:
        return cast("BuildingUnit", self.units[number])

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
