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
def test_diagonal(case, method):
    with jax.enable_x64(True):
        a, b = -jnp.asarray(case["diag_jac"]), jnp.asarray(case["diag_rhs"])
        h, _ = linear_scan(a, b, method=method)
        case.check("diag_sol", h)


@methods
def test_blocks_and_dense_matrices(case, method):
    for name in case.names(""):
        kind, _, what = name.partition("_")
        if what != "jac" or kind == "diag":
            continue
        with jax.enable_x64(True):
            matrices, r = case[name], case[f"{kind}_rhs"]
            batch, time, rows, size = matrices.shape
            width = rows // size  # the state is `size` blocks of so many channels
            a = np.moveaxis(matrices.reshape(batch, time, size, width, size), -1, 3)
            r = r.reshape(batch, time, size, width)
            h, _ = block_scan(jnp.asarray(-a), jnp.asarray(r), method=method)
            case.check(f"{kind}_sol", np.asarray(h).reshape(batch, time, rows))


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
