"""NRRN, its weights, and the slot it runs in. Needs torch, NumPy and safetensors alone."""

from nrrn_pipeline.network.nrrn import NRRN, activation_bytes, flop_per_voxel, reach_of
from nrrn_pipeline.network.slot import (
    DEVICES,
    Network,
    TorchNetwork,
    choose_device,
    in_slot,
    load_network,
    refuse_unknown_device,
    seconds_per_pixel,
)
from nrrn_pipeline.network.weights import import_vemden, load_weights, read_header, save_weights, weights_hash

__all__ = [
    "DEVICES",
    "NRRN",
    "Network",
    "TorchNetwork",
    "activation_bytes",
    "choose_device",
    "flop_per_voxel",
    "import_vemden",
    "in_slot",
    "load_network",
    "load_weights",
    "reach_of",
    "read_header",
    "refuse_unknown_device",
    "save_weights",
    "seconds_per_pixel",
    "weights_hash",
]
