"""Mamba against its original: hidden states, logits, gradients, cached decoding, conversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import convert
from jaxrec.convert.engine import find, read_tensors, to_tensors
from tests.golden.harness import Case, cases


@pytest.fixture(params=cases("mamba"), ids=lambda folder: folder.name, scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.load_model()


@pytest.fixture(scope="module")
def tokens(case):
    return jnp.asarray(case["input_ids"], jnp.int32)


def test_logits(case, model, tokens):
    case.check("logits", jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens))


def test_hidden_states(case, model, tokens):
    """The original keeps the stream after each block, from hidden_0 on, and then the normed one.
    The README says that hidden_0 is the embedding, which the arrays are not."""

    @jax.jit
    def streams(model, tokens):
        x, state = model.embed(tokens), model.init_state(tokens.shape[0])

        def body(x, layer):
            block, block_state = layer
            x, _ = block(x, block_state)
            return x, x

        _, after = jax.lax.scan(body, x, (model.blocks, state.blocks))
        return [*after, model.norm(after[-1])]

    for i, stream in enumerate(streams(model, tokens)):
        if f"hidden_{i}" in case:
            case.check(f"hidden_{i}", stream)


def test_gradients(case, model, tokens):
    cotangent = jnp.asarray(case["cot_logits"])
    gradient = jax.jit(
        jax.grad(lambda model: jnp.sum(model(tokens)[0] * cotangent)),
    )(model)
    tensors = to_tensors(find(case.system), model, gradient)
    for name in case.names("grad_"):
        case.check(name, tensors[name.removeprefix("grad_").replace("__", ".")])


def test_cached_decoding(case, model, tokens):
    """The last steps one token at a time; the first of them is the end of the prefill."""
    steps = case["cached_step_logits"].shape[1]
    run = jax.jit(lambda model, tokens, state: model(tokens, state))
    prefill = tokens.shape[1] - steps + 1
    new, state = run(model, tokens[:, :prefill], model.init_state(tokens.shape[0]))
    logits = [new[:, -1]]
    for t in range(prefill, tokens.shape[1]):
        new, state = run(model, tokens[:, t : t + 1], state)
        logits.append(new[:, 0])
    case.check("cached_step_logits", np.stack(logits, axis=1))


def test_the_table_round_trips(case, model, tmp_path):
    convert.export(model, tmp_path, case.system)
    again = convert.load(case.system, tmp_path)
    assert again.config == model.config
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(left, right)
    tensors, exported = read_tensors(case.folder), read_tensors(tmp_path)
    repeated = find(case.system).repeated(model.config).keys()
    assert exported.keys() == tensors.keys() - repeated
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
