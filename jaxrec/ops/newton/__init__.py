"""Nonlinear recurrences in time, solved by a loop in depth over scans in time."""

from jaxrec.ops.newton.plan import NewtonInfo
from jaxrec.ops.newton.scan import newton_scan
from jaxrec.ops.newton.slstm import slstm_newton_scan
from jaxrec.ops.newton.stability import Stability, stability

__all__ = ["NewtonInfo", "Stability", "newton_scan", "slstm_newton_scan", "stability"]
