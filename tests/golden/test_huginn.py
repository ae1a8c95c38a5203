"""Huginn against its original: prelude, every core state, logits, losses, gradients, cached
decoding, greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import generation
from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops import attention
from jaxrec.training.losses import cross_entropy
from tests.golden.harness import cases, check_round_trip

LEFT_TO_RECURRENT_DEPTH_INFERENCE = (
    "strategy:",  # cache strategies for tokens of unequal depth
    "strategy_decode_num_steps",
    "exit:",  # adaptive exits
    "exit_max_steps",
    "greedy_tokens_zero_state_continuous_compute",
    "diffusion",  # parallel sampler
    "speculative_tokens",
)


FOLDERS = cases("huginn")


@pytest.fixture(scope="module")
def forward(case, model):
    """Logits at any depth from the case's latent states; one compilation for all depths."""
    run = jax.jit(lambda model, tokens, latent, depth: model(tokens, depth=depth, latent=latent)[0])
    tokens, latent = jnp.asarray(case["input_ids"], jnp.int32), jnp.asarray(case["input_states"])
    return lambda depth: run(model, tokens, latent, jnp.int32(depth))


def test_prelude_core_states_and_coda(case, model):
    tokens = jnp.asarray(case["input_ids"], jnp.int32)
    view, _ = attention.open_view(None, tokens.shape)

    @jax.jit
    def run(model, latent):
        embedded, _ = model.embed(tokens, view)

        def loop(latent, _):
            latent, _, _ = model.refine(latent, embedded, 1, view)
            return latent, latent

        steps = case["core_states_per_step"].shape[0]
        last, states = jax.lax.scan(loop, latent, None, length=steps)
        return embedded, states, model.predict(last, view)[0]

    embedded, states, logits = run(model, jnp.asarray(case["input_states"]))
    case.check("prelude_out", embedded)
    case.check("core_states_per_step", states)
    case.check("logits_from_core_states", logits)
    for name in case.names("latents_r"):
        depth = int(name.removeprefix("latents_r").removesuffix("_after_ln_f"))
        case.check(name, model.norm(states[depth - 1]))


def test_logits_at_every_depth(case, forward):
    for name in case.names("logits_r"):
        case.check(name, forward(int(name.removeprefix("logits_r"))))


@pytest.mark.parametrize("kind", ["trunc", "full"])
def test_loss_and_gradients(case, model, kind):
    tokens = jnp.asarray(case["input_ids"], jnp.int32)
    labels = jnp.asarray(case["labels"], jnp.int32)
    ungraded, graded = (int(n) for n in case[f"grad_steps_{kind}"])

    @jax.jit
    def loss_and_grad(model, latent, depth):
        def loss(model, latent):
            logits, _ = model(tokens, depth=depth, latent=latent, grad_steps=graded)
            return cross_entropy(logits, labels)

        return jax.value_and_grad(loss, argnums=(0, 1))(model, latent)

    latent = jnp.asarray(case["input_states"])
    loss, (gradient, latent_gradient) = loss_and_grad(model, latent, jnp.int32(ungraded + graded))
    tensors = to_tensors(find(case.system), model, gradient)
    case.check(f"loss_{kind}", loss)
    for name in case.names(f"grad_{kind}:"):
        tensor = name.removeprefix(f"grad_{kind}:")
        case.check(name, latent_gradient if tensor == "input_states" else tensors[tensor])


def test_prefill_and_cached_decoding(case, model):
    tokens = jnp.asarray(case["input_ids"], jnp.int32)
    latent = jnp.asarray(case["input_states"])
    batch, time = tokens.shape
    prefill = int(case["cache_prefill_len"])
    depth = deepest(case)
    run = jax.jit(
        lambda model, tokens, latent, cache: model(tokens, cache, latent=latent, depth=depth)
    )

    def decode(sizes):
        cache = model.init_state(batch, capacity=time, depth=depth)
        logits, begin = [], 0
        for size in sizes:
            part = slice(begin, begin + size)
            new, cache = run(model, tokens[:, part], latent[:, part], cache)
            logits.append(new)
            begin += size
        return np.concatenate(logits, axis=1)

    case.check("cached_decode_logits", decode([prefill] + [1] * (time - prefill)))
    chunk = case["cached_chunk_logits"].shape[1]
    case.check("cached_chunk_logits", decode([time - chunk, chunk])[:, -chunk:])


def test_greedy_tokens(case, model):
    expected = case["greedy_tokens_zero_state"]
    prompt = shared_prefix(case["input_ids"][0], expected[0])
    new = generation.complete(
        model,
        [prompt],
        max_new_tokens=expected.shape[1] - len(prompt),
        config=generation.SamplingConfig(temperature=0.0),
        key=jax.random.key(0),
        latent_key=None,
        depth=deepest(case),
    )
    case.check("greedy_tokens_zero_state", np.concatenate([prompt, new[0]])[None])


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at(LEFT_TO_RECURRENT_DEPTH_INFERENCE)


def deepest(case) -> int:
    """The number of loops at which the case decodes: its deepest logits."""
    return max(int(name.removeprefix("logits_r")) for name in case.names("logits_r"))


def shared_prefix(row, sequence) -> list[int]:
    """The prompt: what the sequence shares with its row. A greedy token that agrees may count as
    prompt."""
    differs = [i for i, (a, b) in enumerate(zip(row, sequence, strict=False)) if a != b]
    length = min([*differs, len(row), len(sequence) - 1])
    return [int(token) for token in sequence[:length]]
