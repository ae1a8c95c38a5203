"""Recurrences in time."""

from jaxrec.ops.time.scan import linear_scan
from jaxrec.ops.time.sharded import sharded_linear_scan

__all__ = ["linear_scan", "sharded_linear_scan"]
