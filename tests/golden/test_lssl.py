"""The linear state-space layer against its definition in float64: discretisation, kernel, both
views.

The arrays are one layer's parameters and not a checkpoint of a published format, so there is no
conversion table: the test puts them where they belong.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.ops import hippo
from jaxrec.ops.time import krylov
from tests.golden.harness import cases

FOLDERS = cases("lssl")


@pytest.fixture(scope="module")
def layer(case):
    case.check_fields("H", "N", "M", "L", "gbt_alpha")
    options = case.config
    config = LSSLConfig(
        width=options["H"],
        state=options["N"],
        outputs=options["M"],
        alpha=options["gbt_alpha"],
        train_transition=True,
    )
    values = {
        "transition": case["A"],
        "input": case["B"],
        "output": case["C"],
        "skip": case["D"],
        "log_step": np.log(case["dt"]),
    }
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, values))


def test_the_transition_is_hippo(case):
    a, b = hippo.legs(case.config["N"])
    case.check("A", a)
    case.check("B", b)


def test_discretisation_and_kernel(case, layer):
    a_bar, b_bar = jax.jit(lambda layer: layer.discretized())(layer)
    case.check("A_bar", a_bar)
    case.check("B_bar", b_bar)
    columns = jax.jit(krylov, static_argnums=2)(a_bar, b_bar, case.config["L"])
    case.check("kernel", jnp.einsum("dmn,dnt->dmt", layer.output[...], columns))


@pytest.mark.parametrize("method", ["scan", "conv"])
def test_outputs_and_state(case, layer, method):
    run = jax.jit(lambda layer, u: layer(u, method=method))
    y, state = run(layer, case["u"][None])
    case.check("y", y[0])
    if "final_state" in case:
        case.check("final_state", state[0])


def test_the_paper_s_fixed_layer_is_the_same_at_these_values(case, layer):
    config = dataclasses.replace(layer.config, train_transition=False)
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    kept = {name: getattr(layer, name)[...] for name in ("log_step", "output", "skip")}
    y, _ = nnx.merge(graph, kept)(case["u"][None])
    case.check("y", y[0])


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()
