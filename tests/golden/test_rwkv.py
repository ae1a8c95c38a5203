"""RWKV-4 against its original: hidden states, logits, gradients, decoding, conversion."""

import jax

from tests.golden.harness import cases, check_logits_and_gradients, check_round_trip, step_by_step

FOLDERS = cases("rwkv")


def test_logits_and_gradients(case, model, tokens):
    check_logits_and_gradients(case, model, tokens, scales=divided(case.config))


def divided(options):
    """What the original multiplies its gradients by, tensor by tensor: in inference it divides the
    weights that write to the stream, by two after every `rescale_every` layers, and takes the
    gradients of what it has then."""
    every = options["rescale_every"]
    return {
        f"rwkv.blocks.{i}.{name}.weight": 2 ** (i // every)
        for i in range(options["num_hidden_layers"] if every > 0 else 0)
        for name in ("attention.output", "feed_forward.value")
    }


def test_hidden_states(case, model, tokens):
    """The original keeps the stream after each block, from hidden_0 on, and then the normed one.
    The README says that hidden_0 is the embedding, which the arrays are not."""

    @jax.jit
    def streams(model, tokens):
        x, state = model.embed(tokens), model.init_state(tokens.shape[0])

        def body(x, layer):
            block, block_state, options = layer
            x, _ = block(x, block_state, **options)
            return x, x

        _, after = jax.lax.scan(body, x, (model.blocks, state.blocks, model.block_options()))
        return [*after, model.norm(after[-1])]

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
