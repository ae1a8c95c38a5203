"""Recurrences in time."""

from jaxrec.ops.time.scan import linear_scan

__all__ = ["linear_scan"]
