"""Huginn against its original: prelude, every core state, logits, losses, gradients, cached
decoding, greedy text."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import generation
from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops import attention
from jaxrec.training.losses import cross_entropy
from tests.golden.harness import cases, check_round_trip

FOLDERS = cases("huginn")
GREEDY = generation.SamplingConfig(temperature=0.0)


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


def test_cache_strategies(case, model):
    """Prefill at full depth, then tokens of unequal depths, whose slots are then missing."""
    tokens = jnp.asarray(case["input_ids"][:1], jnp.int32)
    latent = jnp.asarray(case["input_states"][:1])
    prefill, deepest_loop = int(case["cache_prefill_len"]), deepest(case)
    depths = case["strategy_decode_num_steps"].tolist()
    run = jax.jit(
        lambda model, tokens, latent, cache, depth: model(tokens, cache, latent=latent, depth=depth)
    )
    for name in case.names("strategy:"):
        _, strategy, array = name.split(":")
        if array != "logits":
            continue
        cache = model.init_state(
            1, capacity=tokens.shape[1], depth=max(deepest_loop, *depths), strategy=strategy
        )
        logits, begin = [], 0
        for size, depth in [(prefill, deepest_loop)] + [(1, depth) for depth in depths]:
            part = slice(begin, begin + size)
            new, cache = run(model, tokens[:, part], latent[:, part], cache, jnp.int32(depth))
            logits.append(new[:, -1])
            begin += size
        case.check(name, np.stack(logits, axis=1))
        slots, entries = held(cache)
        case.check(f"strategy:{strategy}:slots", slots)
        case.check(f"strategy:{strategy}:entries", entries)


def held(cache):
    """Ids of the slots that tokens hold, those of the coda negative, and how many are held."""
    layout = cache.layout
    loops = np.asarray(cache.loops)[0, : int(cache.kv.length)]
    core = np.array([layout.held(int(n) * layout.core) for n in loops])
    slots = np.arange(-layout.coda, layout.prelude + core.max())
    return slots, np.sum(core + layout.prelude + layout.coda)


def test_greedy_tokens(case, model):
    expected = case["greedy_tokens_zero_state"]
    prompt = shared_prefix(case["input_ids"][0], expected[0])
    new = generation.complete(
        model,
        [prompt],
        max_new_tokens=expected.shape[1] - len(prompt),
        config=GREEDY,
        key=jax.random.key(0),
        latent_key=None,
        depth=deepest(case),
    )
    case.check("greedy_tokens_zero_state", np.concatenate([prompt, new[0]])[None])


def test_continuous_compute(case, model):
    """Every row of the case, each token beginning at the normed latent state of the one before."""
    name = "greedy_tokens_zero_state_continuous_compute"
    expected = case[name]
    prompts = [shared_prefix(a, b) for a, b in zip(case["input_ids"], expected, strict=False)]
    length = min(len(prompt) for prompt in prompts)
    steps = generation.generate_adaptive(
        model,
        [prompt[:length] for prompt in prompts],
        max_new_tokens=expected.shape[1] - length,
        depth=deepest(case),
        strategy="full",
        continuous=True,
        config=GREEDY,
    )
    new = np.stack([step.tokens for step in steps], axis=1)
    case.check(name, np.concatenate([expected[:, :length], new], axis=1))


def test_adaptive_exits(case, model):
    """Tokens, loops and criteria after every loop, for each criterion, threshold and strategy."""
    for name in case.names("exit:"):
        _, criterion, threshold, strategy, array = name.split(":")
        if array != "tokens":
            continue
        prefix = name.removesuffix("tokens")
        expected, loops = case[name], case[f"{prefix}steps"]
        prompt = expected[0, : expected.shape[1] - len(loops)].tolist()
        steps = list(
            generation.generate_adaptive(
                model,
                [prompt],
                max_new_tokens=len(loops),
                exit=exit_of(criterion, threshold),
                depth=int(case["exit_max_steps"]),
                strategy=strategy,
                config=GREEDY,
            )
        )
        new = [int(step.tokens[0]) for step in steps]
        case.check(name, np.array([prompt + new]))
        case.check(f"{prefix}steps", np.array([step.loops[0] for step in steps]))
        values = np.stack([step.values[0] for step in steps])
        if criterion == "none":  # the original notes a zero for every loop
            values = np.where(np.arange(values.shape[1]) < loops[:, None], 0.0, np.nan)
        shown = case[f"{prefix}values"].shape[1]
        assert np.all(np.isnan(values[:, shown:]))
        case.check(f"{prefix}values", np.where(np.isnan(values), -1, values)[:, :shown])


def exit_of(criterion, threshold):
    if criterion == "none":
        return None
    threshold = None if threshold == "auto" else float(threshold)
    return generation.Exit(criterion=criterion, threshold=threshold)


OPTIONS = {  # of the parallel sampler, with the original's names
    "inner_recurrence": "inner_loops",
    "freeze_strategy": "freeze",
    "exit_t": "threshold",
    "ema_embeds": "embedding_ema",
    "state_noise_mixing": "noise",
    "dampened_state_mixer": "dampened",
    "sqrt_mixer": "sqrt_mixer",
    "headway": "headway",
    "continuous_compute": "continuous",
    "max_wavefront": "max_wavefront",
    "full_prefill": "full_prefill",
    "init_scale": "latent_scale",
    "max_diffusion_steps": "max_steps",
    "cache_lookup_strategy": "strategy",
}


def test_diffusion_forcing(case, model):
    """Tokens, what is guessed and frozen after every step, loops of every position, all counts."""
    readme = (case.folder / "README.md").read_text()
    for run, kwargs in re.findall(r"^- (diffusion\d+) kwargs: (\{.*?\}):", readme, re.MULTILINE):
        asked = {"state_noise_mixing": 0.5, "num_steps": 32} | json.loads(kwargs)
        mode = asked.pop("_mode", None)
        new, depth = asked.pop("max_new_tokens"), asked.pop("num_steps")
        options = {OPTIONS[name]: value for name, value in asked.items()}
        states = [case[name][0] for name in case.names(f"{run}:tape")]
        assert bool(states) == (mode == "tape")
        steps = list(
            generation.generate_diffusion(
                model,
                [prompt_of(case)],
                max_new_tokens=new,
                depth=depth,
                options=generation.DiffusionForcing(**options, may_rewrite_prompt=True),
                config=GREEDY,
                tape=generation.Tape(
                    states or [np.zeros((1, model.config.width))],
                    [case[name] for name in case.names(f"{run}:extra")],
                )
                if states or case.names(f"{run}:extra")
                else None,
            )
        )
        check_wave(case, run, steps)


def check_wave(case, run, steps):
    end = steps[-1]
    frozen = int(end.frozen[0])
    case.check(f"{run}:tokens", end.tokens[:, :frozen])
    case.check(f"{run}:num_core_forward_passes", end.core_passes[0])
    case.check(f"{run}:num_tokens_forward", end.position_passes[0])
    case.check(f"{run}:num_cache_clears", end.cache_clears[0])
    case.check(f"{run}:num_standing_waves", end.standing_waves[0])
    case.check(f"{run}:diffusion_steps", end.steps[0])
    case.check(f"{run}:gen_seq_length", end.length[0])
    case.check(f"{run}:recurrence_per_position", end.loops[:, :frozen])
    case.check(f"{run}:token_stable_per_position", end.stable[:, :frozen])
    width = case[f"{run}:token_tablet"].shape[1]

    def tablet(counts):
        shown = np.stack([step.tokens[0, :width] for step in steps[1:]])
        counts = np.stack([count[0] for count in counts])[1:, None]
        return np.where(np.arange(width) < counts, shown, 0)

    case.check(f"{run}:token_tablet", tablet([step.length for step in steps]))
    case.check(f"{run}:frozen_tablet", tablet([step.frozen for step in steps]))


def test_speculative_decoding(case, model):
    """Draft, lookahead and depth are those of the README."""
    name = "speculative_tokens"
    if name not in case:
        return
    readme = (case.folder / "README.md").read_text()
    said = re.search(
        rf"`{name}`: draft_steps=(\d+), lookahead (\d+), verify r=(\d+), (\d+) new tokens", readme
    )
    draft_depth, lookahead, depth, new = map(int, said.groups())
    *_, end = generation.generate_speculative(
        model,
        [prompt_of(case)],
        max_new_tokens=new,
        draft_depth=draft_depth,
        lookahead=lookahead,
        depth=depth,
        config=GREEDY,
    )
    case.check(name, end.tokens[:, : int(end.length[0])])


def prompt_of(case) -> list[int]:
    """The prompt of row 0 that the README speaks of."""
    readme = (case.folder / "README.md").read_text()
    length = int(re.search(r"prompt = first (\d+) tokens", readme)[1])
    return case["input_ids"][0, :length].tolist()


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()


def deepest(case) -> int:
    """The number of loops at which the case decodes: its deepest logits."""
    return max(int(name.removeprefix("logits_r")) for name in case.names("logits_r"))


def shared_prefix(row, sequence) -> list[int]:
    """The prompt: what the sequence shares with its row. A greedy token that agrees may count as
    prompt."""
    differs = [i for i, (a, b) in enumerate(zip(row, sequence, strict=False)) if a != b]
    length = min([*differs, len(row), len(sequence) - 1])
    return [int(token) for token in sequence[:length]]
