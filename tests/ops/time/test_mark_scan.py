"""What the laws do not say of `mark_scan`: gates without axes of state tracking, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import mark_scan
from tests import references


def scalars():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 7, 2, 3)).astype(np.float32) for _ in range(3))
    gates = [rng.normal(size=(2, 7, 2)).astype(np.float32) * np.float32(0.5) for _ in range(4)]
    return q, k, v, *gates


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_scalar_gates_need_no_axes_of_state_tracking(chunk):
    case = scalars()
    y, state = jax.jit(lambda *case: mark_scan(*case, chunk=chunk))(*case)
    reset = np.zeros((2, 7), bool)
    start = np.zeros((2, 2, 3, 3, 1), np.float32)
    gates = [z.reshape(*z.shape, *(1,) * n) for z, n in zip(case[3:], (3, 2, 3, 4), strict=True)]
    qkv = (z[..., None] for z in case[:3])
    want, last = references.mark_scan(*qkv, *gates, start, reset)
    np.testing.assert_allclose(y, want[..., 0], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 5, 2, 4))}, r"k must be \(b=2 t=5 h=2 k=3\), got \(2, 5, 2, 4\)"),
        ({"k": jnp.zeros((2, 5, 2, 3), jnp.bfloat16)}, "q, k and v must have one floating dtype"),
        ({"mark": jnp.zeros((2, 5, 2), jnp.bfloat16)}, "gates must all be float32"),
        ({"state": jnp.zeros((2, 2, 3, 3))}, r"state must be \(b h k v jt\) = \(2, 2, 3, 3, 1\)"),
        ({"reset": jnp.zeros((2, 5))}, r"reset must be bool \(b t\) = \(2, 5\), got float32"),
        ({"chunk": 0}, "chunk must be >= 1"),
        ({"method": "fast"}, "method must be one of"),
    ],
)
def test_bad_input_is_refused(change, message):
    wide, lead = jnp.zeros((2, 5, 2, 3)), jnp.zeros((2, 5, 2))
    good = {"q": wide, "k": wide, "v": wide}
    good |= dict.fromkeys(("source", "transition", "mark", "direct"), lead)
    with pytest.raises(ValueError, match=message):
        mark_scan(**(good | change))


def test_no_step_is_refused():
    wide, lead = jnp.zeros((2, 0, 2, 3)), jnp.zeros((2, 0, 2))
    with pytest.raises(ValueError, match="needs at least one step"):
        mark_scan(wide, wide, wide, lead, lead, lead, lead)
