"""Published checkpoints in and out: one table per system, one strict engine."""

from jaxrec.convert.engine import SYSTEMS, export, load

__all__ = ["SYSTEMS", "export", "load"]
