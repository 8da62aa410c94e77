"""A few places of a volume before and after, as the full run will give them: looked at before it is begun."""

from nrrn_pipeline.previewing.regions import REGIONS, Preview, Region, preview
from nrrn_pipeline.previewing.showing import rows_of, write_preview

__all__ = ["REGIONS", "Preview", "Region", "preview", "rows_of", "write_preview"]
