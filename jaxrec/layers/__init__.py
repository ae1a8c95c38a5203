"""Thin `flax.nnx` modules over `jaxrec.ops`, and the table of axis names."""
