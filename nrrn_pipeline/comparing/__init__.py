"""Methods of denoising side by side on one volume."""

from nrrn_pipeline.comparing.measuring import Compared, Comparison, Yardstick, compare
from nrrn_pipeline.comparing.methods import Candidate, candidates
from nrrn_pipeline.comparing.showing import COLUMNS, results_of, shown_columns, write_results

__all__ = [
    "COLUMNS",
    "Candidate",
    "Compared",
    "Comparison",
    "Yardstick",
    "candidates",
    "compare",
    "results_of",
    "shown_columns",
    "write_results",
]
