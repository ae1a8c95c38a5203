"""Linear solves of ParaRNN, s_t + M_t s_{t-1} = r_t from zero, against the original's recursive
doubling: our scans with the transition -M, in float64 as the original's were computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import block_scan, linear_scan
from tests.golden.harness import cases

FOLDERS = [folder for folder in cases("pararnn") if not (folder / "weights.safetensors").exists()]
methods = pytest.mark.parametrize("method", ["sequential", "associative", "chunked"])


@methods
def test_solutions(case, method):
    """Of every structure that the case has."""
    names = [name for name in case.names("") if name.endswith("_jac")]
    assert names
    for name in names:
        kind, matrices = name.removesuffix("_jac"), case[name]
        with jax.enable_x64(True):
            a, r = -matrices, case[f"{kind}_rhs"]
            if a.ndim == r.ndim:
                h, _ = linear_scan(jnp.asarray(a), jnp.asarray(r), method=method)
            else:
                batch, time, rows, size = a.shape
                width = rows // size  # the state is `size` blocks of so many channels
                a = np.moveaxis(a.reshape(batch, time, size, width, size), -1, 3)
                r = r.reshape(batch, time, size, width)
                h, _ = block_scan(jnp.asarray(a), jnp.asarray(r), method=method)
            case.check(f"{kind}_sol", np.reshape(h, case[f"{kind}_sol"].shape))


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
