"""Recurrence in JAX: time scans, depth loops and Newton solvers, and the models built from them.

Importing this package touches no device, no network and no compiler; import the part you need:
`jaxrec.ops`, `jaxrec.layers`, `jaxrec.models`, `jaxrec.generation`, `jaxrec.training` or
`jaxrec.convert`.
"""

__version__ = "0.1.0"
