"""Nonlinear recurrences in time, solved by a loop in depth over scans in time."""

from jaxrec.ops.newton.plan import NewtonInfo
from jaxrec.ops.newton.scan import newton_scan

__all__ = ["NewtonInfo", "newton_scan"]
