"""Where tasks run: each kind of cluster turns settings into a Dask client that cleans up after itself."""

from nrrn_pipeline.cluster.address import AddressSettings, address_client
from nrrn_pipeline.cluster.base import Cluster, ClusterSettings
from nrrn_pipeline.cluster.keys import make_keys
from nrrn_pipeline.cluster.kinds import load_settings, started
from nrrn_pipeline.cluster.local import LocalSettings, local_client

__all__ = [
    "AddressSettings",
    "Cluster",
    "ClusterSettings",
    "LocalSettings",
    "address_client",
    "load_settings",
    "local_client",
    "make_keys",
    "started",
]
