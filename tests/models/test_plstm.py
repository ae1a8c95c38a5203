"""pLSTM's language model: its size, post-up blocks, what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.layers.plstm import PLSTMConfig
from jaxrec.layers.plstm_block import SequenceBlockConfig
from jaxrec.models import plstm
from tests.models import toy
from tests.models.toy import run

SMALLEST = plstm.lm_config(vocab_size=13, width=8, layers=2, heads=2)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


def test_number_of_parameters():
    inner, heads, jt, jv, jo = 256, 4, 4, 4, 4
    conv = 5 * inner
    gates = heads * (jt * jv + jo * jt) * (inner + 1) + heads * jo * jv
    transition = heads * (jt + 2 * jt * jt) * (inner + 1)
    projections = 3 * (inner * 4 + inner)
    tail = 2 * inner  # norm and skip
    block = 128 + 129 * 2 * inner + 257 * 128 + conv + gates + transition + projections + tail
    assert toy.parameters(plstm.TINY) == 2 * 272 * 128 + 128 + 4 * block


def test_state_tracking_begins_near_the_identity():
    """tanh(5) = 0.9999 on the diagonal, so that the first state is kept."""
    model = toy.initialised(SMALLEST)
    layer = jax.tree.map(lambda leaf: leaf[0], model.blocks).mixer
    t = layer.transition(np.ones((1, 1, 16), np.float32))[0, 0]
    np.testing.assert_allclose(t, np.broadcast_to(np.tanh(5) * np.eye(4), t.shape), atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_post_up_blocks_stream(gated):
    mixer = PLSTMConfig(width=8, heads=2, key_width=4, value_width=2, jo=2, jv=1, jt=2, chunk=2)
    block = SequenceBlockConfig(
        width=8, kind="post_up", inner=12, gated=gated, scaled=True, mixer=mixer
    )
    model = toy.drawn(dataclasses.replace(SMALLEST, block=block))
    whole, _ = run(model, TOKENS)
    first, state = run(model, TOKENS[:, :4], model.init_state(2))
    second, _ = run(model, TOKENS[:, 4:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=5e-6)


def test_bad_configurations_are_refused():
    block = SMALLEST.block
    with pytest.raises(ValueError, match="the mixer of a post_up block must have the width 8"):
        dataclasses.replace(block, kind="post_up")
    with pytest.raises(ValueError, match="a pre-up block is neither scaled nor dropped"):
        dataclasses.replace(block, drop=0.1)
    with pytest.raises(ValueError, match=r"drop must lie in \[0, 1\), got 1\.0"):
        dataclasses.replace(block, drop=1.0)
    with pytest.raises(ValueError, match="logits_soft_cap must be > 0"):
        dataclasses.replace(SMALLEST, logits_soft_cap=0.0)
