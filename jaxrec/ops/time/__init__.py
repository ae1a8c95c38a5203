"""Recurrences in time."""

from jaxrec.ops.time.lti import (
    dense_scan,
    diagonal_kernel,
    diagonal_last_state,
    fft_conv,
    krylov,
)
from jaxrec.ops.time.scan import linear_scan

__all__ = [
    "linear_scan",
    "dense_scan",
    "diagonal_kernel",
    "diagonal_last_state",
    "fft_conv",
    "krylov",
]
