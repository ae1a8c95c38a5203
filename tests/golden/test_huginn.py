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
    if f"grad_steps_{kind}" not in case:
        return
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
    if "cache_prefill_len" not in case:
        return
    tokens = jnp.asarray(case["input_ids"], jnp.int32)
    latent = jnp.asarray(case["input_states"])
    batch, time = tokens.shape
    prefill = int(case["cache_prefill_len"])
    depth = int(said(case, r"cached_decode_logits - logits_r(\d+)"))
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
    if "cached_chunk_logits" in case:
        chunk = case["cached_chunk_logits"].shape[1]
        case.check("cached_chunk_logits", decode([time - chunk, chunk])[:, -chunk:])


def test_cache_strategies(case, model):
    """Prefill at full depth, then tokens of unequal depths, whose slots are then missing."""
    if "strategy_decode_num_steps" not in case:
        return
    tokens = jnp.asarray(case["input_ids"][:1], jnp.int32)
    latent = jnp.asarray(case["input_states"][:1])
    prefill, prefill_depth = (
        int(case["cache_prefill_len"]),
        int(said(case, r"prefill with r=(\d+)")),
    )
    depths = case["strategy_decode_num_steps"].tolist()
    run = jax.jit(
        lambda model, tokens, latent, cache, depth: model(tokens, cache, latent=latent, depth=depth)
    )
    for name in case.names("strategy:"):
        _, strategy, array = name.split(":")
        if array != "logits":
            continue
        cache = model.init_state(
            1, capacity=tokens.shape[1], depth=max(prefill_depth, *depths), strategy=strategy
        )
        logits, begin = [], 0
        for size, depth in [(prefill, prefill_depth)] + [(1, depth) for depth in depths]:
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
    name = "greedy_tokens_zero_state"
    if name not in case:
        return
    prompt, new, depth = greedy_run(case)
    (tokens,) = generation.complete(
        model,
        [case["input_ids"][0, :prompt].tolist()],
        max_new_tokens=new,
        config=GREEDY,
        key=jax.random.key(0),
        latent_key=None,
        depth=depth,
    )
    case.check(name, np.concatenate([case["input_ids"][0, :prompt], tokens])[None])


def test_continuous_compute(case, model):
    """Every row of the case, each token beginning at the normed latent state of the one before."""
    name = "greedy_tokens_zero_state_continuous_compute"
    if name not in case:
        return
    prompt, new, depth = greedy_run(case)
    prompts = case["input_ids"][: len(case[name]), :prompt]
    steps = generation.generate_adaptive(
        model,
        prompts.tolist(),
        max_new_tokens=new,
        depth=depth,
        strategy="full",
        continuous=True,
        config=GREEDY,
    )
    tokens = np.stack([step.tokens for step in steps], axis=1)
    case.check(name, np.concatenate([prompts, tokens], axis=1))


def greedy_run(case) -> list[int]:
    """Tokens of the prompt, new ones and loops of the greedy runs."""
    return [
        int(said(case, rf"`greedy_tokens_zero_state`: {before}(\d+)"))
        for before in ("prompt = first ", r"[^\n]*, (?=\d+ new tokens)", r"[^\n]*?\br=")
    ]


def test_adaptive_exits(case, model):
    """Tokens, loops and criteria after every loop, for each criterion, threshold and strategy."""
    for name in case.names("exit:"):
        _, criterion, threshold, strategy, array = name.split(":")
        if array != "tokens":
            continue
        prefix = name.removesuffix("tokens")
        expected, loops = case[name], case[f"{prefix}steps"]
        prompt = expected[0, : expected.shape[1] - len(loops)].tolist()
        deepest = int(case["exit_max_steps"])
        steps = list(
            generation.generate_adaptive(
                model,
                [prompt],
                max_new_tokens=len(loops),
                depth=deepest,
                strategy=strategy,
                config=GREEDY,
                **exit_of(criterion, threshold, deepest),
            )
        )
        new = [int(step.tokens[0]) for step in steps]
        case.check(name, np.array([prompt + new]))
        case.check(f"{prefix}steps", np.array([step.loops[0] for step in steps]))
        values = np.stack([step.values[0] for step in steps])
        if criterion in ("none", "schedule"):  # the original notes a zero for every loop
            values = np.where(np.arange(values.shape[1]) < loops[:, None], 0.0, np.nan)
        shown = case[f"{prefix}values"].shape[1]
        assert np.all(np.isnan(values[:, shown:]))
        case.check(f"{prefix}values", np.where(np.isnan(values), -1, values)[:, :shown])


def exit_of(criterion, threshold, deepest):
    """Options of `generate_adaptive`; the threshold of a schedule lists the loops of each token."""
    if criterion == "none":
        return {}
    if criterion == "schedule":
        loops = [int(count) for count in re.findall(r"\d+", threshold)]
        return {"schedule": [min(max(count, 1), deepest) for count in loops]}
    threshold = None if threshold == "auto" else float(threshold)
    return {"exit": generation.Exit(criterion=criterion, threshold=threshold)}


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
        recorded = 2 * (new + asked.get("headway", 1))
        check_wave(case, run, steps, recorded)


def check_wave(case, run, steps, recorded: int):
    """The original draws up tablets for so many steps before it begins, and the step in which it
    gives up, beyond max_diffusion_steps, is in none: it does not count as a step either."""
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
    assert width >= int(end.length[0])
    noted = steps[1:][: min(recorded, int(end.steps[0]))]

    def tablet(counts):
        shown = np.stack([step.tokens[0, :width] for step in noted])
        counts = np.stack([count[0] for count in counts])[1 : len(noted) + 1, None]
        return np.where(np.arange(width) < counts, shown, 0)

    case.check(f"{run}:token_tablet", tablet([step.length for step in steps]))
    case.check(f"{run}:frozen_tablet", tablet([step.frozen for step in steps]))


def test_speculative_decoding(case, model):
    """Draft, lookahead, depth, cache and threshold of acceptance are those of the README."""
    name = "speculative_tokens"
    if name not in case:
        return
    line = said(case, rf"(`{name}`: .*)")
    draft_depth, lookahead, depth, new = (
        int(re.search(pattern, line)[1])
        for pattern in (r"draft_steps=(\d+)", r"lookahead (\d+)", r"verify r=(\d+)", r"(\d+) new")
    )
    accepted = re.search(r"threshold\W*(\d*\.?\d+)", line)
    *_, end = generation.generate_speculative(
        model,
        [prompt_of(case)],
        max_new_tokens=new,
        draft_depth=draft_depth,
        lookahead=lookahead,
        depth=depth,
        threshold=float(accepted[1]) if accepted else 1.0,
        strategy=re.search(r'lookup "([^"]+)"', line)[1],
        config=GREEDY,
    )
    case.check(name, end.tokens[:, : int(end.length[0])])


def prompt_of(case) -> list[int]:
    """The prompt of row 0 that the README speaks of."""
    length = int(said(case, r"prompt = first (\d+) tokens"))
    return case["input_ids"][0, :length].tolist()


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()


def said(case, pattern: str) -> str:
    """What the case's README says where the pattern matches."""
    match = re.search(pattern, (case.folder / "README.md").read_text())
    assert match, f"the README of {case.folder.name} says nothing like {pattern}"
    return match[1]
