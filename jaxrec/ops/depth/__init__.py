"""Recurrences in depth."""

from jaxrec.ops.depth.iterate import IterateInfo, iterate
from jaxrec.ops.depth.remat import RematPolicy, remat_scan, remat_step

__all__ = ["IterateInfo", "RematPolicy", "iterate", "remat_scan", "remat_step"]
