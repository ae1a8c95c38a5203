"""Recurrences in time."""

from jaxrec.ops.time.scan import linear_scan
from jaxrec.ops.time.selective import selective_scan

__all__ = ["linear_scan", "selective_scan"]
