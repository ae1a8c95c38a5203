"""xLSTM against its original: hidden states, logits, gradients, decoding, conversion."""

import jax

from tests.golden.harness import cases, check_logits_and_gradients, check_round_trip, step_by_step

FOLDERS = cases("xlstm")


def test_logits_and_gradients(case, model, tokens):
    check_logits_and_gradients(case, model, tokens)


def test_hidden_states(case, model, tokens):
    """The original keeps what enters each block, and then the normed stream."""

    @jax.jit
    def streams(model, tokens):
        x, state = model.embed(tokens), model.init_state(tokens.shape[0])

        def body(x, layer):
            block, block_state = layer
            return block(x, block_state)[0], x

        x, before = jax.lax.scan(body, x, (model.blocks, state.blocks))
        return [*before, model.norm(x)]

    for i, stream in enumerate(streams(model, tokens)):
        if f"hidden_{i}" in case:
            case.check(f"hidden_{i}", stream, gap_is_of_others=True)  # it is one of the logits


def test_decoding_step_by_step(case, model, tokens):
    """The state against the logits of the whole sequence; the original's own was left out."""
    case.check("logits", step_by_step(model, tokens))


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
