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


def test_every_field_is_known(case):
    case.check_fields("B", "T", "H", "K", "V", "scale", "initial_state")


def scale(case) -> np.float32:
    """The factor on queries, a number or "K**-0.5"; that too where the case does not say."""
    given = case.config.get("scale")
    if given is None:
        given = case["q"].shape[-1] ** -0.5
    if isinstance(given, str):
        base, exponent = given.replace(" ", "").split("**")
        given = case.config[base] ** float(exponent)
    return np.float32(given)


def check(case, name, run, inputs) -> None:
    """What run(inputs) -> o, S gives, and the gradients of sum(o cot_o) + sum(S cot_S), the second
    where the case has S; of the inputs by their letters."""
    last_state = f"{name}__S"

    @jax.jit
    def both(x, cotangents):
        results, pull_back = jax.vjp(run, x)
        return results, pull_back(cotangents)[0]

    gradients = case.names(f"{name}__grad_")
    if gradients:
        shapes = jax.eval_shape(run, inputs)
        cotangents = [
            cotangent(case, name, end).reshape(shape.shape)
            if f"{name}__{end}" in case
            else np.zeros(shape.shape, np.float32)
            for end, shape in zip("oS", shapes, strict=True)
        ]
        (y, last), found = both(inputs, tuple(cotangents))
        for array in gradients:
            case.check(array, found[array.removeprefix(f"{name}__grad_")])
    else:
        y, last = jax.jit(run)(inputs)
    case.check(f"{name}__o", y)
    if last_state in case:
        case.check(last_state, last)


def cotangent(case, name, end):
    """A recurrence's own, or the one that all share."""
    own = f"{name}__cot_{end}"
    return case[own if own in case else f"cot_{end}"]


@forms
def test_outputs_last_states_and_gradients(case, method, chunk):
    for name, needs in RECURRENCES.items():
        if f"{name}__o" in case:
            check_recurrence(case, name, needs, method=method, chunk=chunk)


def check_recurrence(case, name, needs, **options):
    inputs = {letter: case[array] for letter, array in ({"q": "q", "v": "v"} | needs).items()}
    if case.config.get("initial_state", "h0" in case):
        inputs["h0"] = case["h0"]
    factor, rule = scale(case), "delta" if "beta" in needs else "gated"

    def run(x):
        more = {"beta": x.get("beta"), "rule": rule}
        return matrix_scan(
            x["q"] * factor, x["k"], x["v"], x.get("g"), x.get("h0"), **more, **options
        )

    check(case, name, run, inputs)


@forms
def test_retention(case, method, chunk):
    """The decays of RetNet are constants of the heads."""
    if "retention__o" not in case:
        return
    inputs, factor = {name: case[name] for name in "qkv"}, scale(case)
    decay = np.log1p(-(2.0 ** (-5.0 - np.arange(inputs["q"].shape[2])))).astype(np.float32)
    decay = np.broadcast_to(decay, inputs["q"].shape[:3])

    def run(x):
        return matrix_scan(x["q"] * factor, x["k"], x["v"], decay, method=method, chunk=chunk)

    check(case, "retention", run, inputs)


@forms
def test_normalised_linear_attention(case, method, chunk):
    """Its inputs, of which the gradients are, are the absolute values of q and k."""
    if "linear_attn_normalized__o" not in case:
        return
    inputs = {"q": np.abs(case["q"]), "k": np.abs(case["k"]), "v": case["v"]}
    factor, options = scale(case), {"normalise": 1e-10, "method": method, "chunk": chunk}

    def run(x):
        y, state = matrix_scan(x["q"] * factor, x["k"], x["v"], **options)
        return y, state[..., : y.shape[-1]]

    check(case, "linear_attn_normalized", run, inputs)


@pytest.mark.parametrize("method", ["sequential", "associative", "chunked"])
def test_hgrn_is_the_diagonal_scan(case, method):
    names = {letter: f"hgrn__{letter}" for letter in ("x", "g", "h0") if f"hgrn__{letter}" in case}
    if not names:
        return

    def run(x):
        return linear_scan(jnp.exp(x["g"]), x["x"], x.get("h0"), method=method)

    check(case, "hgrn", run, {letter: case[name] for letter, name in names.items()})


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()
