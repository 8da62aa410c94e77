"""NRRN, its weights, and the slot it runs in. Needs torch, NumPy and safetensors alone."""

from nrrn_pipeline.network.nrrn import NRRN
from nrrn_pipeline.network.slot import Network, TorchNetwork, choose_device, in_slot, load_network
from nrrn_pipeline.network.weights import import_vemden, load_weights, read_header, save_weights, weights_hash

__all__ = [
    "NRRN",
    "Network",
    "TorchNetwork",
    "choose_device",
    "import_vemden",
    "in_slot",
    "load_network",
    "load_weights",
    "read_header",
    "save_weights",
    "weights_hash",
]
