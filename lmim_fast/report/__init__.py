"""`lmim report`: a run as one HTML page."""

from lmim_fast.report.write import write_report

__all__ = ["write_report"]
