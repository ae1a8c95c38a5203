"""`jaxrec bench train`: what a looped language model costs: forward, trained, decoded, by depth."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.cli import bench, timing, torch_peer
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete
from jaxrec.models.huginn import Huginn, HuginnConfig
from jaxrec.ops.depth.remat import REMAT_POLICIES, RematPolicy
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.losses import cross_entropy
from jaxrec.training.sharding import build_mesh
from jaxrec.training.step import build_steps

PEER = "huginn_torch"
FIGURE = {"forward": 0.9, "step": 1.8}
"""Seconds of the original PyTorch program at batch 4, 256 tokens, 4 + 4 loops, on a machine with
two cores. The inner width of its MLP was not recorded."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed; lengths in tokens."""

    width: int = 256
    heads: int = 4
    layers: tuple[int, int, int] = (2, 4, 2)
    batch: int = 4
    time: int = 256
    depth: int = 8
    graded: int = 4  # of the loops, the last, that the gradient passes through
    prompt: int = 16
    new_tokens: int = 64

    def model(self, mlp_width: int) -> HuginnConfig:
        """The model, on bytes."""
        return HuginnConfig(
            vocab_size=272,
            width=self.width,
            heads=self.heads,
            mlp_width=mlp_width,
            prelude_layers=self.layers[0],
            core_layers=self.layers[1],
            coda_layers=self.layers[2],
            context=max(self.time, 128),
            mean_depth=self.depth,
            backprop_depth=self.graded,
        )


SMALL = Sizes(
    width=16, heads=2, layers=(1, 2, 1), batch=2, time=16, depth=3, graded=2, prompt=2, new_tokens=3
)
"""Where the two programs are compared, and what --smoke times."""
SMALL_MLP = 32


def run(arguments: "bench.TrainArguments") -> None:
    """Times the parts that are asked for, and prints what came out.

    Raises:
      UserError: an argument is not positive.
      WrongNumbers: the PyTorch program and this one do not agree.
    """
    for name in ("mlp_widths", "depths", "decode_depths", "decode_batches", "parts"):
        values = getattr(arguments, name)
        if not values or (name != "parts" and min(values) < 1):
            raise UserError(f"--{name.replace('_', '-')}: expected numbers >= 1, got {values}.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    timing.check_out(arguments.out)
    sizes, rounds, mlp_widths = Sizes(), arguments.rounds, arguments.mlp_widths
    depths = arguments.depths
    decode_depths, decode_batches = arguments.decode_depths, arguments.decode_batches
    if arguments.smoke:
        sizes, rounds, mlp_widths, depths = SMALL, 1, (SMALL_MLP,), (1, 3)
        decode_depths, decode_batches = (2,), (2,)
    peer = load_peer()
    if peer is not None and "step" in arguments.parts:
        torch_peer.refuse_differences(f"the PyTorch program {PEER}.py", peer_differences(peer))
        timing.say("the PyTorch program agrees: logits and every gradient")
    if peer is not None and "decode" in arguments.parts:
        refuse_other_text(peer)
        timing.say("the PyTorch program writes the same text")
    report: dict[str, Any] = {
        "benchmark": "train",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "sizes": dataclasses.asdict(sizes),
        "torch": None if peer is None else peer.torch.__version__,
        "results": [],
    }
    with timing.without_compilation_cache():
        if "step" in arguments.parts:
            # The first width last: the next part uses its program again.
            steps = [measure_step(sizes, mlp, rounds, peer) for mlp in reversed(mlp_widths)]
            report["results"] += reversed(steps)
        if "remat" in arguments.parts:
            report["results"] += measure_remat(sizes, mlp_widths[0], rounds)
        if "depth" in arguments.parts:
            report["results"] += measure_depth(sizes, mlp_widths[0], depths, rounds)
            report["results"] += measure_compilation(sizes, mlp_widths[0], depths)
        if "decode" in arguments.parts:
            report["results"] += measure_decoding(
                sizes, mlp_widths[0], decode_depths, decode_batches, rounds, peer
            )
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def load_peer() -> Any | None:
    """The PyTorch program of this checkout; None without it or without PyTorch."""
    return torch_peer.load(PEER)


def peer_differences(peer: Any) -> dict[str, float]:
    """What `torch_peer.differences` finds at a small size, from equal weights."""
    sizes = SMALL
    model = sizes.model(SMALL_MLP).build(rngs=nnx.Rngs(0))
    tokens, labels, latent = _inputs(sizes, model.config)
    theirs = peer.load(model.config, engine.to_tensors(engine.find("huginn"), model))
    loops = sizes.depth - sizes.graded, sizes.graded
    return torch_peer.differences(
        "huginn",
        model,
        lambda model: model(tokens, depth=jnp.int32(sizes.depth), latent=latent)[0],
        labels,
        theirs,
        lambda: theirs(*torch_peer.to_torch(tokens, latent), *loops),
    )


def measure_step(sizes: Sizes, mlp_width: int, rounds: int, peer: Any | None) -> dict[str, Any]:
    """A forward pass and a training step, beside PyTorch's and a large matrix product, in turns."""
    config = sizes.model(mlp_width)
    tokens, labels, latent = _inputs(sizes, config)
    train = trainer(sizes, config)
    depth = jnp.int32(sizes.depth)
    params = jax.tree.map(jnp.copy, train.state["params"])  # a step consumes its state

    def forward(params: Any, tokens: Array, depth: Array, latent: Array) -> Array:
        return train.merge(params)(tokens, depth=depth, latent=latent)[0]

    program = timing.compile_program(forward, params, tokens, depth, latent)
    timing.say(
        f"inner width {mlp_width}: step compiled in {train.program.compile_seconds:.1f} s,"
        f" forward pass in {program.compile_seconds:.1f} s"
    )
    calls: dict[str, Callable[[], Any]] = {
        "matmul": timing.matrix_product(),
        "forward": functools.partial(program.call, params, tokens, depth, latent),
        "step": functools.partial(train.step, sizes.depth),
    }
    if peer is not None:
        tensors = engine.to_tensors(engine.find("huginn"), train.merge(params))
        calls |= _torch_calls(peer, config, sizes, tensors, tokens, labels, latent)
    times = timing.race(calls, rounds)

    peak = timing.peak(times["matmul"])
    record: dict[str, Any] = {
        "part": "step",
        "mlp_width": mlp_width,
        "peak_gflop_per_s": peak / 1e9,
        "temp_mib": train.program.temp_mib,
    }
    for what, compiled in (("forward", program), ("step", train.program)):
        work = config.flops_per_token(sizes.time, sizes.depth, training=what == "step")
        work *= sizes.batch * sizes.time
        time = times[what]
        record[what] = {
            "median_s": time.median,
            "least_s": time.least,
            "compile_s": compiled.compile_seconds,
            "gflop": work / 1e9,
            "gflop_per_s": work / 1e9 / time.least,
            "bound_s": work / peak,
            "figure_s": FIGURE[what],
            "figure_to_ours": FIGURE[what] / time.median,
        }
        if peer is not None:
            theirs = times[f"torch {what}"]
            record[what] |= {
                "torch_median_s": theirs.median,
                "torch_least_s": theirs.least,
                "torch_to_ours_median": theirs.median / time.median,
                "torch_to_ours_least": theirs.least / time.least,
            }
    return record


class Trainer:
    """One run's training step as `jaxrec train` compiles it, its state, and one batch."""

    def __init__(self, sizes: Sizes, config: HuginnConfig, remat: RematPolicy):
        settings = TrainConfig(steps=1000, batch=sizes.batch, time=sizes.time, remat=remat)
        steps = build_steps(config, settings, build_mesh("data=1"))
        tokens, labels, _ = _inputs(sizes, config)
        self.batch = {
            "inputs": tokens,
            "labels": labels,
            "segment_ids": jnp.ones((sizes.batch, sizes.time), jnp.int32),
        }
        self.state, self.merge = steps.init(), steps.merge
        self.program = timing.compile_program(
            steps.train, self.state, self.batch, jnp.int32(sizes.depth)
        )

    def step(self, depth: int) -> Array:
        """One update with `depth` loops; returns the loss."""
        self.state, metrics = self.program.call(self.state, self.batch, jnp.int32(depth))
        return metrics["loss"]


@functools.lru_cache(maxsize=len(REMAT_POLICIES))
def trainer(sizes: Sizes, config: HuginnConfig, remat: RematPolicy = TrainConfig.remat) -> Trainer:
    """The trainer of these sizes; compiled once for the parts that follow each other."""
    return Trainer(sizes, config, remat)


def _inputs(sizes: Sizes, config: HuginnConfig) -> tuple[Array, Array, Array]:
    """Tokens and labels (b t), and an initial latent state (b t d)."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.batch, sizes.time)
    tokens, labels = (
        jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32) for key in keys[:2]
    )
    return tokens, labels, 0.4**0.5 * jax.random.normal(keys[2], (*shape, config.width))


def _torch_calls(
    peer: Any,
    config: HuginnConfig,
    sizes: Sizes,
    tensors: dict[str, np.ndarray],
    tokens: Array,
    labels: Array,
    latent: Array,
) -> dict[str, Callable[[], Any]]:
    import torch

    torch.set_num_threads(timing.cpu_threads())
    model = peer.load(config, tensors)
    inputs, targets, start = torch_peer.to_torch(tokens, labels, latent)
    settings = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )

    def forward() -> None:
        with torch.no_grad():
            model(inputs, start, sizes.depth, 0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        drawn = 0.4**0.5 * torch.randn_like(start)
        logits = model(inputs, drawn, sizes.depth - sizes.graded, sizes.graded)
        torch_peer.torch_loss(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
        optimizer.step()

    return {"torch forward": forward, "torch step": step}


def measure_remat(sizes: Sizes, mlp_width: int, rounds: int) -> list[dict[str, Any]]:
    """One training step under each policy of what its backward pass computes again."""
    config = sizes.model(mlp_width)
    trainers = {policy: trainer(sizes, config, policy) for policy in REMAT_POLICIES}
    times = timing.race(
        {name: functools.partial(train.step, sizes.depth) for name, train in trainers.items()},
        rounds,
    )
    return [
        {
            "part": "remat",
            "remat": name,
            "mlp_width": mlp_width,
            "median_s": times[name].median,
            "least_s": times[name].least,
            "compile_s": train.program.compile_seconds,
            "temp_mib": train.program.temp_mib,
        }
        for name, train in trainers.items()
    ]


def measure_depth(
    sizes: Sizes, mlp_width: int, depths: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """One compiled training step at several depths: depth is an argument of the program."""
    config = sizes.model(mlp_width)
    train = trainer(sizes, config)
    times = timing.race(
        {str(depth): functools.partial(train.step, depth) for depth in depths}, rounds
    )
    records = []
    for depth in depths:
        time = times[str(depth)]
        work = config.flops_per_token(sizes.time, depth, training=True) * sizes.batch * sizes.time
        records.append(
            {
                "part": "depth",
                "depth": depth,
                "mlp_width": mlp_width,
                "median_s": time.median,
                "least_s": time.least,
                "gflop": work / 1e9,
                "gflop_per_s": work / 1e9 / time.least,
                "programs_compiled": 1,
                "compile_s": train.program.compile_seconds,
            }
        )
    return records


def measure_compilation(
    sizes: Sizes, mlp_width: int, depths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Compile time of the loss and its gradient, depth fixed in the program, every loop graded."""
    config = sizes.model(mlp_width)
    model = config.build(rngs=nnx.Rngs(0))
    tokens, labels, latent = _inputs(sizes, config)
    records = []
    for depth in sorted({min(depths), max(depths)}):

        def loss(model: Huginn, depth: int = depth) -> Array:
            logits = model(tokens, depth=depth, grad_steps=depth, latent=latent)[0]
            return cross_entropy(logits, labels)

        program = timing.compile_program(jax.value_and_grad(loss), model)
        timing.say(f"gradient through {depth} loops: compiled in {program.compile_seconds:.1f} s")
        records.append(
            {
                "part": "compile",
                "depth": depth,
                "mlp_width": mlp_width,
                "compile_s": program.compile_seconds,
                "temp_mib": program.temp_mib,
            }
        )
    return records


def measure_decoding(
    sizes: Sizes,
    mlp_width: int,
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    rounds: int,
    peer: Any | None,
) -> list[dict[str, Any]]:
    """Greedy continuation of prompts from the cache, reading them included, in turns with
    PyTorch's.
    """
    model = sizes.model(mlp_width).build(rngs=nnx.Rngs(0))
    theirs = None
    if peer is not None:
        import torch

        torch.set_num_threads(timing.cpu_threads())
        theirs = peer.load(model.config, engine.to_tensors(engine.find("huginn"), model))
    records = []
    for depth, batch in itertools.product(depths, batches):
        calls = {"jaxrec": functools.partial(_decoded, model, sizes, depth, batch)}
        if theirs is not None:
            calls["torch"] = functools.partial(_torch_decoded, theirs, sizes, depth, batch)
        times = timing.race(calls, rounds)
        ours, tokens = times["jaxrec"], batch * sizes.new_tokens
        record: dict[str, Any] = {
            "part": "decode",
            "depth": depth,
            "batch": batch,
            "mlp_width": mlp_width,
            "median_s": ours.median,
            "least_s": ours.least,
            "prompt": sizes.prompt,
            "new_tokens": sizes.new_tokens,
            "tokens_per_s": tokens / ours.median,
        }
        if theirs is not None:
            their = times["torch"]
            record |= {
                "torch_median_s": their.median,
                "torch_least_s": their.least,
                "torch_tokens_per_s": tokens / their.median,
                "torch_to_ours_median": their.median / ours.median,
                "torch_to_ours_least": their.least / ours.least,
            }
        records.append(record)
        timing.say(f"decoding at depth {depth}, batch {batch}: {record['tokens_per_s']:.0f}/s")
    return records


def refuse_other_text(peer: Any) -> None:
    """Compares the greedy text of both programs at a small size.

    Raises:
      WrongNumbers: it differs.
    """
    model = SMALL.model(SMALL_MLP).build(rngs=nnx.Rngs(0))
    theirs = peer.load(model.config, engine.to_tensors(engine.find("huginn"), model))
    sizes = dataclasses.replace(SMALL, prompt=5, new_tokens=8)
    ours = _decoded(model, sizes, depth=3, batch=2)
    other = _torch_decoded(theirs, sizes, depth=3, batch=2).tolist()
    if ours != other:
        raise timing.WrongNumbers(
            f"the PyTorch program {PEER}.py and jaxrec write different texts: {other} and {ours}."
        )


def _prompts(sizes: Sizes, batch: int) -> list[list[int]]:
    return [list(range(row + 1, row + 1 + sizes.prompt)) for row in range(batch)]


def _decoded(model: Huginn, sizes: Sizes, depth: int, batch: int) -> list[list[int]]:
    return complete(
        model,
        _prompts(sizes, batch),
        max_new_tokens=sizes.new_tokens,
        depth=depth,
        config=SamplingConfig(temperature=0),
    )


def _torch_decoded(model: Any, sizes: Sizes, depth: int, batch: int) -> Any:
    import torch

    return model.generate(torch.tensor(_prompts(sizes, batch)), depth, sizes.new_tokens)
