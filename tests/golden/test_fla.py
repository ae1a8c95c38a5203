"""`matrix_scan` against the plain recurrences of flash-linear-attention: outputs, last states, all
gradients; and its diagonal recurrence, which is `linear_scan`.

The arrays are inputs and outputs of functions, so there is nothing to convert.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import linear_scan, matrix_scan
from tests.golden.harness import cases

FOLDERS = cases("fla")

# what a recurrence takes beside q and v: its keys, its decay, its beta; names of arrays
RECURRENCES = {
    "linear_attn": {"k": "k"},
    "gla": {"k": "k", "g": "g_key"},
    "simple_gla": {"k": "k", "g": "g_scalar"},
    "delta_rule": {"k": "k_l2norm", "beta": "beta"},
    "gated_delta_rule": {"k": "k_l2norm", "g": "g_scalar", "beta": "beta"},
    "kda": {"k": "k_l2norm", "g": "g_key", "beta": "beta"},
}
# the whole sequence in one chunk, several chunks, and steps
FORMS = [("chunkwise", 64), ("chunkwise", 8), ("sequential", 64)]
forms = pytest.mark.parametrize("method, chunk", FORMS)


def scale(case) -> np.float32:
    """The factor on queries, a number or "K**-0.5"; that too where the case does not say."""
    given = case.config.get("scale", "K**-0.5")
    if isinstance(given, str):
        base, exponent = given.replace(" ", "").split("**")
        given = case.config[base] ** float(exponent)
    return np.float32(given)


@forms
def test_outputs_last_states_and_gradients(case, method, chunk):
    for name, needs in RECURRENCES.items():
        if f"{name}__o" in case:
            check_recurrence(case, name, needs, method=method, chunk=chunk)


def check_recurrence(case, name, needs, **options):
    inputs = {letter: case[array] for letter, array in ({"q": "q", "v": "v"} | needs).items()}
    if case.config.get("initial_state", "h0" in case):
        inputs["h0"] = case["h0"]
    rule = "delta" if "beta" in needs else "gated"

    def run(x):
        q = x["q"] * scale(case)
        more = {"beta": x.get("beta"), "rule": rule}
        return matrix_scan(q, x["k"], x["v"], x.get("g"), x.get("h0"), **more, **options)

    gradients = case.names(f"{name}__grad_")
    if gradients:
        cotangents = case["cot_o"], case["cot_S"]

        @jax.jit
        def both(x):
            results, pull_back = jax.vjp(run, x)
            return results, pull_back(cotangents)[0]

        (y, last), gradient = both(inputs)
        for array in gradients:
            case.check(array, gradient[array.removeprefix(f"{name}__grad_")])
    else:
        y, last = jax.jit(run)(inputs)
    case.check(f"{name}__o", y)
    case.check(f"{name}__S", last)


@forms
def test_retention(case, method, chunk):
    """The decays of RetNet are constants of the heads."""
    if "retention__o" not in case:
        return
    q, k, v = case["q"], case["k"], case["v"]
    decay = np.log1p(-(2.0 ** (-5.0 - np.arange(q.shape[2])))).astype(np.float32)
    decay = np.broadcast_to(decay, q.shape[:3])
    y, _ = jax.jit(lambda *x: matrix_scan(*x, method=method, chunk=chunk))(
        q * scale(case), k, v, decay
    )
    case.check("retention__o", y)


@forms
def test_normalised_linear_attention(case, method, chunk):
    if "linear_attn_normalized__o" not in case:
        return
    q, k = (np.abs(case[name]) for name in "qk")
    y, _ = jax.jit(lambda *x: matrix_scan(*x, normalise=1e-10, method=method, chunk=chunk))(
        q * scale(case), k, case["v"]
    )
    case.check("linear_attn_normalized__o", y)


@pytest.mark.parametrize("method", ["sequential", "associative", "chunked"])
def test_hgrn_is_the_diagonal_scan(case, method):
    if "hgrn__x" not in case:
        return
    h, last = jax.jit(lambda g, x: linear_scan(jnp.exp(g), x, method=method))(
        case["hgrn__g"], case["hgrn__x"]
    )
    case.check("hgrn__o", h)
    case.check("hgrn__S", last)


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()
