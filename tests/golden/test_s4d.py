"""S4D against its definition in float64.

The arrays are one layer's parameters and not a checkpoint of a published format, so there is no
conversion table: the test puts them where they belong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.s4d import S4DConfig, initial_eigenvalues
from tests.golden.harness import cases

FOLDERS = cases("s4d")


@pytest.fixture(scope="module")
def layer(case):
    case.check_fields("H", "N", "L", "disc", "init")
    options = case.config
    config = S4DConfig(
        width=options["H"],
        state=options["N"],
        init=options["init"],
        discretization=options["disc"],
    )
    shape = case["C_re"].shape
    values = {
        "log_rate": np.broadcast_to(np.log(-case["Lambda_re"]), shape),
        "frequency": np.broadcast_to(case["Lambda_im"], shape),
        "output_real": case["C_re"],
        "output_imag": case["C_im"],
        "skip": case["D"],
        "log_step": np.log(case["dt"]),
    }
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, values))


def test_the_eigenvalues_begin_there(case):
    """Whichever of each conjugate pair was kept, and in whichever order."""
    begin = initial_eigenvalues(case.config["init"], case.config["N"])
    order = np.argsort(np.abs(begin.imag))
    sign = np.sign(np.sum(case["Lambda_im"])) * np.sign(np.sum(begin.imag))
    given = np.argsort(np.abs(case["Lambda_im"]))
    case.check("Lambda_re", begin.real[order][np.argsort(given)])
    case.check("Lambda_im", sign * begin.imag[order][np.argsort(given)])


def test_the_kernel_is_the_response_to_an_impulse(case, layer):
    impulse = np.zeros((1, case.config["L"], case.config["H"]), np.float32)
    impulse[:, 0] = 1
    for method in ("scan", "conv"):
        y, _ = jax.jit(lambda layer, u, method=method: layer(u, method=method))(layer, impulse)
        case.check("kernel", (y - layer.skip[...][None, None] * impulse)[0].T)


@pytest.mark.parametrize("method", ["scan", "conv"])
def test_outputs(case, layer, method):
    y, state = jax.jit(lambda layer, u: layer(u, method=method))(layer, case["u"][None])
    case.check("y", y[0])
    states = {"": state[0], "_re": np.real(state[0]), "_im": np.imag(state[0])}
    for part, got in states.items():
        if f"final_state{part}" in case:
            case.check(f"final_state{part}", got)


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()
