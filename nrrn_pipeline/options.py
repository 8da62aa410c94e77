"""How to denoise, as users ask for it, from the command line or a script."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from nrrn_pipeline.cluster import AddressSettings, ClusterSettings, LocalSettings, load_settings
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.geometry import Box
from nrrn_pipeline.keeping import KEEP_GB
from nrrn_pipeline.members import Share
from nrrn_pipeline.network import refuse_unknown_device
from nrrn_pipeline.planning import Method
from nrrn_pipeline.slabs import Layout


@dataclass(frozen=True)
class Options:
    """How to denoise.

    level: pyramid level of an OME-Zarr source. roi: the part to denoise, in the level's voxels, as
    Box.parse("0:8,0:512,0:512"). layout: slab, chunk, shard, tile and halo. method: images, statistics, a filter, how
    tiles are stitched. device: "auto", "cpu" or "cuda". cluster: "local", "serial", a Dask scheduler's address, or
    settings of a cluster, also as the name of a TOML file with them; keys: the folder with the certificates for an
    address. workers: processes of a local cluster; None: as many as cores and memory carry. prefetch: each of them
    reads the next slab, and writes the last, while one computes. keep_gb: each of them keeps so much of the source, if
    its memory carries that, as its next slabs read the same chunks; 0: nothing. overwrite: delete an output that
    exists. pyramid: make levels of lower resolution too, for viewers. share: this process is one of several that share
    the work without a Dask cluster, each called alike but for the number of its share.
    """

    level: int = 0
    roi: Box | None = None
    layout: Layout = field(default_factory=Layout)
    method: Method = field(default_factory=Method)
    device: str = "auto"
    cluster: str | ClusterSettings = "local"
    keys: str | None = None
    workers: int | None = None
    prefetch: bool = True
    keep_gb: float = KEEP_GB
    overwrite: bool = False
    pyramid: bool = False
    share: Share | None = None
    cluster_settings: ClusterSettings | None = field(init=False)  # of `cluster`; None: serial

    def __post_init__(self) -> None:
        """Raises InputError for a device, cluster or number of workers that cannot be."""
        refuse_unknown_device(self.device)
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers {self.workers} is not possible: use 1 or more")
        if not 0 <= self.keep_gb < inf:
            raise InputError(f"keep {self.keep_gb:g} GB is not possible: use 0, which keeps nothing, or more")
        settings = _settings_of(self.cluster, self.keys, self.workers)
        if self.share is not None:
            if not isinstance(settings, LocalSettings | None) or self.workers is not None:
                raise InputError(f"shard {self.share} is done by this process alone: give no cluster and no workers")
            if self.overwrite:
                raise InputError(f"shard {self.share} cannot overwrite, as others are at work: delete the output first")
            settings = None
        object.__setattr__(self, "cluster_settings", settings)

    @property
    def here(self) -> bool:
        """Whether this machine does the work, so that its memory and devices are what counts."""
        return isinstance(self.cluster_settings, LocalSettings | None)

    @property
    def slabs_each(self) -> int:
        """Slabs that one worker process has in flight."""
        return 2 if self.prefetch and (self.cluster_settings or self.share) else 1


def _settings_of(cluster: str | ClusterSettings, keys: str | None, workers: int | None) -> ClusterSettings | None:
    """The settings that `cluster` stands for; None for serial."""
    if isinstance(cluster, str) and not cluster.endswith(".toml") and ":" in cluster:
        if workers is not None:
            raise InputError(f"workers are for local clusters: {cluster} has those that were started for it")
        return AddressSettings(address=cluster, keys=keys)
    if keys is not None:
        raise InputError(f"keys are for a cluster that is there already: give its address, not {cluster}")
    if cluster == "serial":
        return None
    if cluster == "local":
        return LocalSettings(workers=workers)
    if isinstance(cluster, str) and not cluster.endswith(".toml"):
        raise InputError(
            f"cluster {cluster!r} is unknown: use local, serial, an address as tls://host:8786 or a TOML file"
        )
    if workers is not None:
        raise InputError(f"workers are for --cluster local: set them in {cluster}")
    return load_settings(cluster) if isinstance(cluster, str) else cluster
