"""One HTML page of a denoising run: whether it is good, at a glance, and all that can be known of it."""

from nrrn_pipeline.run_page.showing import write_report

__all__ = ["write_report"]
