"""Many volumes in one go: a manifest becomes jobs, and jobs are done one after the other on one cluster."""

from nrrn_pipeline.batch.manifest import Job, Settings, read_manifest
from nrrn_pipeline.batch.runs import BatchWatch, Result, exit_status, run_batch, table_of
from nrrn_pipeline.batch.watching import watch_batch

__all__ = [
    "BatchWatch",
    "Job",
    "Result",
    "Settings",
    "exit_status",
    "read_manifest",
    "run_batch",
    "table_of",
    "watch_batch",
]
