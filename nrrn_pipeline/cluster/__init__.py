"""Where tasks run: each kind of cluster turns settings into a Dask client that cleans up after itself.

Every worker imports this package: `checks.py`, which needs torch, is imported by name.
"""

from nrrn_pipeline.cluster.address import AddressSettings, address_client
from nrrn_pipeline.cluster.base import Cluster, ClusterSettings
from nrrn_pipeline.cluster.jobqueue_settings import (
    JobQueueSettings,
    LsfSettings,
    PbsSettings,
    SgeSettings,
    SlurmSettings,
)
from nrrn_pipeline.cluster.keys import make_keys
from nrrn_pipeline.cluster.kinds import load_settings, started
from nrrn_pipeline.cluster.local import LocalSettings, local_client
from nrrn_pipeline.cluster.ssh import SshSettings

__all__ = [
    "AddressSettings",
    "Cluster",
    "ClusterSettings",
    "JobQueueSettings",
    "LocalSettings",
    "LsfSettings",
    "PbsSettings",
    "SgeSettings",
    "SlurmSettings",
    "SshSettings",
    "address_client",
    "load_settings",
    "local_client",
    "make_keys",
    "started",
]
