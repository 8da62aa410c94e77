"""Volumes side by side in Neuroglancer: `layers.py` what is shown, `state.py` how, `server.py` to a browser here."""

from nrrn_pipeline.viewing.layers import Layer, Level, find_layers
from nrrn_pipeline.viewing.server import serving
from nrrn_pipeline.viewing.state import public_url, viewer_state

__all__ = ["Layer", "Level", "find_layers", "public_url", "serving", "viewer_state"]
