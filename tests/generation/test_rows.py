"""Rows of unequal lengths: their keys, their ends, what of them is new; and one row not mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig
from jaxrec.generation.programs import FlatModel, over_rows
from jaxrec.generation.rows import End, RowKeys, Texts
from tests.models import toy
from tests.models.test_huginn import SMALLEST

GREEDY = SamplingConfig(temperature=0.0)


def test_new_tokens_are_shown_once_up_to_a_stop_or_the_limit():
    texts = Texts([[1, 1], [2], [3, 3, 3]], 4, [9])
    padded = np.array(texts.padded(12))
    np.testing.assert_array_equal(padded[:, :3], [[1, 1, 0], [2, 0, 0], [3, 3, 3]])
    padded[0, 2:10], padded[1, 1:6], padded[2, 3:5] = range(20, 28), [30, 31, 9, 32, 33], [40, 41]
    assert texts.new(padded, np.array([3, 3, 3])) == [[20], [30, 31], []]
    assert texts.new(padded, np.array([5, 6, 2])) == [[21, 22], [], []]  # 9 stops, 2 is a step back
    assert texts.new(padded, np.array([9, 6, 5])) == [[23], [], [40, 41]]  # 4 tokens are the limit


def test_a_row_ends_at_a_new_stop_token_or_when_it_is_full():
    end, tokens = End.of([9, 8], 3), jnp.array([9, 1, 8, 2, 2, 2])

    def is_reached(begin, length, prompt):
        return bool(end.is_reached(tokens, *map(jnp.int32, (begin, length, prompt))))

    assert is_reached(1, 3, 1) and not is_reached(1, 2, 1) and not is_reached(3, 5, 3)
    assert is_reached(3, 6, 3)
    assert not End.of([], 9).is_reached(tokens, jnp.int32(0), jnp.int32(6), jnp.int32(1))


def test_keys_are_there_for_what_is_drawn():
    key = jax.random.key(0)
    keys = RowKeys.of(3, SamplingConfig(), key, None)
    assert keys.latents is None and keys.draws.shape == keys.guesses.shape == (3,)
    assert RowKeys.of(3, GREEDY, None, key).draws is None
    with pytest.raises(UserError, match="drawing tokens needs a key"):
        RowKeys.of(3, SamplingConfig(), None, key)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_single_row_is_what_it_is_among_others(rows):
    x, y = jnp.arange(12.0).reshape(3, 4)[:rows], jnp.arange(1.0, 4.0)[:rows]
    each = over_rows(lambda pair: {"sum": jnp.sum(pair[0]) * pair[1]}, rows)
    np.testing.assert_array_equal(each((x, y))["sum"], jnp.sum(x, axis=1) * y)


def test_a_flat_model_is_the_model_and_compiles_once():
    model = toy.drawn(SMALLEST)
    total = jax.jit(lambda flat: jnp.sum(flat.module().embedding.table[...]))
    assert total(FlatModel.of(model)) == jnp.sum(model.embedding.table[...])
    total(FlatModel.of(jax.tree.map(lambda leaf: 2 * leaf, model)))
    assert total._cache_size() == 1
