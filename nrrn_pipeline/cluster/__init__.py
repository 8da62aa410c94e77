"""Where tasks run: each kind of cluster turns settings into a Dask client that cleans up after itself."""

from nrrn_pipeline.cluster.address import address_client
from nrrn_pipeline.cluster.keys import make_keys
from nrrn_pipeline.cluster.local import local_client

__all__ = ["address_client", "local_client", "make_keys"]
