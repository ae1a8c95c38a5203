"""The commands of `jaxrec`: one module each, an `Arguments` dataclass and a `run` function."""
