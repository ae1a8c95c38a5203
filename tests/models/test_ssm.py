"""Language models of S5, S4D and LSSL against a loop; their sizes, and what they say of
themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.ssm import TINY_LSSL, TINY_S4D, TINY_S5, SSMConfig
from jaxrec.testing import assert_close
from tests import references
from tests.models import toy

CONFIG = SSMConfig(vocab_size=13, width=6, state_size=4, mlp_width=8, layers=2, context=16)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


def ran(params, x, kind):
    reset = np.zeros(x.shape[:2], bool)
    if kind == "s5":
        return references.s5(params, x, np.zeros((2, 4), complex), reset, "zoh", True)[0]
    if kind == "s4d":
        return references.s4d(params, x, np.zeros((2, 6, 2), complex), reset, "zoh")[0]
    return references.lssl(params, x, np.zeros((2, 6, 4)), reset, 0.5)[0][..., 0]


@pytest.mark.parametrize("kind", ["s5", "s4d", "lssl"])
def test_equals_the_loop(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    model = toy.initialised(config)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.split(model)[1])
    )
    table = params["embedding"]["table"]
    x = 6**0.5 * table[TOKENS]
    for i in range(2):
        block = references.layer(params["blocks"], i)
        mixer = block["mixer"]
        g = references.gelu(ran(mixer["layer"], references.rms_norm(block["mixer_norm"], x), kind))
        value, gate = (
            references.linear(mixer["activation"][name], g) for name in ("value", "gate")
        )
        x = x + value * references.sigmoid(gate)
        normed = references.rms_norm(block["mlp_norm"], x)
        x = x + references.gated_mlp(block["mlp"], normed, references.gelu)
    want = 30 * np.tanh(references.rms_norm(params["norm"], x) @ table.T / 30)
    assert_close(toy.run(model, TOKENS)[0], want, rtol=2e-5)


def test_the_sizes_hold_about_as_much_as_the_others():
    counts = [toy.parameters(config) for config in (TINY_S5, TINY_S4D, TINY_LSSL)]
    assert counts == [988544, 922752, 877824]


def test_a_model_that_grows_says_so():
    """A matrix whose eigenvalues are positive is no error, and is told from a stable one."""
    model = toy.initialised(dataclasses.replace(CONFIG, kind="lssl"))
    measure = jax.jit(lambda model: model.measure(TOKENS))
    found = measure(model)
    assert found["unstable"] == 0 and 0.9 < found["largest_decay"] < 1
    layer = model.blocks.mixer.layer
    layer.transition = nnx.Param(
        layer.transition[...].at[1].multiply(-1.0), axes=("state", "state")
    )
    grown = measure(model)
    assert grown["unstable"] == 1 and grown["largest_decay"] > 1
    assert jnp.all(jnp.isfinite(toy.run(model, TOKENS)[0]))


def test_bad_configurations_are_refused():
    for fields, message in (
        ({"kind": "s4"}, r"kind must be one of s5, s4d, lssl, got 's4'"),
        ({"kind": "s4d", "state_size": 3}, r"state must be even"),
        ({"dt_min": 1.0}, r"SSMConfig: step sizes need 0 < dt_min <= dt_max, got 1\.0 and 0\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **fields)
