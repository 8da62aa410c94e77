"""Methods of denoising side by side on one volume."""

from nrrn_pipeline.comparing.measuring import Compared, Comparison, Yardstick, compare
from nrrn_pipeline.comparing.methods import Candidate, candidates
from nrrn_pipeline.comparing.showing import shown_columns, write_results

__all__ = [
    "Candidate",
    "Compared",
    "Comparison",
    "Yardstick",
    "candidates",
    "compare",
    "shown_columns",
    "write_results",
]
