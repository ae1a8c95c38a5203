"""How far loops move the latent states, against loops run one by one."""

import jax
import numpy as np

from jaxrec.analysis.depth_use import latent_changes, loops_to_settle
from jaxrec.ops import attention
from tests.models import toy
from tests.models.test_huginn import SMALLEST, TOKENS


def test_changes_are_those_of_one_loop_after_the_other():
    model, key = toy.drawn(SMALLEST), jax.random.key(0)
    changes = latent_changes(model, TOKENS, depth=3, key=key)
    view, _ = attention.open_view(None, TOKENS.shape)
    embedded, _ = model.embed(TOKENS, view)
    states = [model.init_latent(key, *TOKENS.shape)]
    for _ in range(3):
        states.append(model.refine(states[-1], embedded, 1, view)[0])
    for change, old, new in zip(changes, states, states[1:], strict=False):
        want = np.linalg.norm(new - old, axis=-1) / np.linalg.norm(new, axis=-1)
        np.testing.assert_allclose(change, want, rtol=1e-4)


def test_a_token_settles_where_it_first_moves_less():
    changes = np.array([[[0.5, 0.5, 0.01]], [[0.02, 0.5, 0.5]], [[0.5, 0.5, 0.5]]])
    np.testing.assert_array_equal(loops_to_settle(changes, 0.03), [[2, 4, 1]])
