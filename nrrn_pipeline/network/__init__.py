"""NRRN and its trained peers, their weights, and the slot they run in. Needs torch, NumPy and safetensors alone."""

from nrrn_pipeline.network.architecture import (
    KINDS,
    Architecture,
    DenoisingNetwork,
    activation_bytes,
    default_inputs,
    flop_per_voxel,
    reach_of,
)
from nrrn_pipeline.network.denoisenet import DenoiseNet
from nrrn_pipeline.network.nrrn import NRRN
from nrrn_pipeline.network.slot import (
    DEVICES,
    Network,
    TorchNetwork,
    choose_device,
    device_text,
    gpu_count,
    in_slot,
    refuse_unknown_device,
    seconds_per_pixel,
)
from nrrn_pipeline.network.unet import UNet
from nrrn_pipeline.network.weights import (
    MAX_BYTES,
    NO_WEIGHTS,
    architecture_of,
    bytes_hash,
    import_vemden,
    load_weights,
    parse_header,
    parse_weights,
    read_header,
    save_weights,
    weights_bytes,
    weights_hash,
)

__all__ = [
    "DEVICES",
    "KINDS",
    "MAX_BYTES",
    "NO_WEIGHTS",
    "NRRN",
    "Architecture",
    "DenoiseNet",
    "DenoisingNetwork",
    "Network",
    "TorchNetwork",
    "UNet",
    "activation_bytes",
    "architecture_of",
    "bytes_hash",
    "choose_device",
    "default_inputs",
    "device_text",
    "flop_per_voxel",
    "gpu_count",
    "import_vemden",
    "in_slot",
    "load_weights",
    "parse_header",
    "parse_weights",
    "reach_of",
    "read_header",
    "refuse_unknown_device",
    "save_weights",
    "seconds_per_pixel",
    "weights_bytes",
    "weights_hash",
]
