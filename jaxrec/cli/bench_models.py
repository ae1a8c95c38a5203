"""`jaxrec bench models`: recurrent language models forward, with their gradient, and decoding,
beside the same models of transformers in PyTorch.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.cli import bench, timing, torch_peer
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.models.rwkv import RWKVConfig
from jaxrec.models.xlstm import XLSTMConfig
from jaxrec.training.config import TrainConfig
from jaxrec.training.losses import cross_entropy
from jaxrec.training.sharding import build_mesh


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed; lengths in tokens."""

    vocab_size: int = 256
    width: int = 256
    layers: int = 4
    mlp_width: int = 384  # of RecurrentGemma; Mamba has no MLP
    heads: int = 4
    batch: int = 4
    time: int = 512
    prompt: int = 16
    new_tokens: int = 64


class System(NamedTuple):
    """A recurrent language model that transformers has too."""

    peer: str  # the stem of its class names in transformers
    config: Callable[[Sizes], Any]
    beside: tuple["bench.ModelPart", ...] = ("forward", "both", "decode")  # what transformers runs
    figure: Mapping[str, float] = MappingProxyType({})
    """Tokens/s of transformers, once measured on the CPU of another machine (benchmarks/README)."""


SYSTEMS: dict[str, System] = {
    "mamba": System(
        "Mamba",
        lambda sizes: MambaConfig(
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            layers=sizes.layers,
            inner_width=2 * sizes.width,
            step_rank=-(-sizes.width // 16),
        ),
        beside=("forward", "decode"),  # one gradient takes minutes on a CPU
        figure={"forward": 1617},
    ),
    "mamba2": System(
        "Mamba2",
        lambda sizes: Mamba2Config(
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            layers=sizes.layers,
            heads=2 * sizes.heads,
            head_width=sizes.width // sizes.heads,
            state_size=2 * sizes.width // sizes.heads,
            tie_embeddings=False,
        ),
        figure={"forward": 7693, "both": 2897, "decode": 145},
    ),
    "recurrentgemma": System(
        "RecurrentGemma",
        lambda sizes: RecurrentGemmaConfig(
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            recurrent_width=sizes.width,
            heads=sizes.heads,
            mlp_width=sizes.mlp_width,
            layers=sizes.layers,
            window=2048,
            context=8192,
        ),
        figure={"forward": 7317, "both": 1838, "decode": 177},
    ),
    "rwkv": System(
        "Rwkv",
        lambda sizes: RWKVConfig(
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            inner_width=sizes.width,
            mlp_width=4 * sizes.width,
            layers=sizes.layers,
        ),
        figure={"forward": 4108, "both": 736, "decode": 182},
    ),
    "xlstm": System(
        "xLSTM",
        lambda sizes: XLSTMConfig(
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            key_width=sizes.width // 2,
            value_width=sizes.width,
            chunk=min(sizes.time, 64),
            mlp_width=-(-sizes.width * 8 // 3 // 64) * 64,
        ),
        beside=("forward", "both"),  # its cache does not fit these sizes
        figure={"forward": 6937, "decode": 121},
    ),
}


SMALL = Sizes(
    vocab_size=64, width=32, mlp_width=48, heads=2, batch=2, time=16, prompt=2, new_tokens=3
)
"""Where the two programs are compared, and what --smoke times."""


def run(arguments: "bench.ModelsArguments") -> None:
    """Times the models that are asked for, and prints what came out.

    Raises:
      UserError: an argument is not positive.
      WrongNumbers: transformers and this library do not agree.
    """
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    if arguments.mlp_width < 1:
        raise UserError(f"--mlp-width must be at least 1, got {arguments.mlp_width}.")
    if not arguments.systems or not arguments.parts:
        raise UserError("--systems and --parts need at least one value.")
    timing.check_out(arguments.out)
    sizes, rounds = Sizes(mlp_width=arguments.mlp_width), arguments.rounds
    if arguments.smoke:
        sizes, rounds = SMALL, 1
    peer = load_peer()
    if peer is not None:
        for system in arguments.systems:
            differences = peer_differences(peer, system)
            torch_peer.refuse_differences(f"{SYSTEMS[system].peer} of transformers", differences)
            timing.say(f"{system}: transformers agrees: logits and every gradient")
    report: dict[str, Any] = {
        "benchmark": "models",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "sizes": dataclasses.asdict(sizes),
        "transformers": None if peer is None else peer.__version__,
        "results": [],
    }
    with timing.without_compilation_cache(), jax.set_mesh(build_mesh("data=1")):
        for system in arguments.systems:
            for part in arguments.parts:
                beside = peer if part in SYSTEMS[system].beside else None
                report["results"].append(measure(system, part, sizes, rounds, beside))
                timing.say(f"{system}: {part} timed")
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def load_peer() -> Any | None:
    """The transformers package; None unless it and PyTorch are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about that package's own affairs
        import transformers

        transformers.logging.set_verbosity_error()
        for system in SYSTEMS.values():  # classes are imported when they are first named
            getattr(transformers, f"{system.peer}ForCausalLM")
    return transformers


def peer_model(peer: Any, system: str, model: Any) -> Any:
    """The model of transformers with the weights of ours."""
    import torch

    table = engine.find(system)
    stem = SYSTEMS[system].peer
    config = getattr(peer, f"{stem}Config")(**table.write_config(model.config))
    theirs = getattr(peer, f"{stem}ForCausalLM")(config).eval()
    tensors = engine.to_tensors(table, model)
    repeated = table.repeated(model.config)
    tensors |= {name: tensors[other] for name, other in repeated.items()}
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    return theirs


def peer_differences(peer: Any, system: str) -> dict[str, float]:
    """What `torch_peer.differences` finds at a small size, from equal weights."""
    model = SYSTEMS[system].config(SMALL).build(rngs=nnx.Rngs(0))
    # Weights that begin at zero leave others without a gradient to compare.
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = (0.05 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))
    model = jax.tree.unflatten(structure, map(jnp.add, leaves, draws))
    tokens, labels = _inputs(SMALL)
    theirs = peer_model(peer, system, model)
    return torch_peer.differences(
        system,
        model,
        lambda model: model(tokens)[0],
        labels,
        theirs,
        lambda: theirs(*torch_peer.to_torch(tokens), use_cache=False).logits,
    )


def _inputs(sizes: Sizes) -> tuple[Array, Array]:
    """Tokens and labels (b t)."""
    shape = (sizes.batch, sizes.time)
    first, second = jax.random.split(jax.random.key(0))
    return tuple(  # type: ignore[return-value]
        jax.random.randint(key, shape, 0, sizes.vocab_size, jnp.int32) for key in (first, second)
    )


def measure(system: str, part: str, sizes: Sizes, rounds: int, peer: Any | None) -> dict[str, Any]:
    """One part of one model, in turns with transformers."""
    config = SYSTEMS[system].config(sizes)
    model = config.build(rngs=nnx.Rngs(0))
    call, compiled = _our_call(model, part, sizes)
    calls = {"jaxrec": call}
    if compiled is not None:
        calls["matmul"] = timing.matrix_product()
    if peer is not None:
        calls["transformers"] = _their_call(peer_model(peer, system, model), part, sizes)
    times = timing.race(calls, rounds)
    tokens = sizes.new_tokens if part == "decode" else sizes.batch * sizes.time
    record: dict[str, Any] = {"system": system, "part": part, "tokens": tokens}
    for name in calls.keys() - {"matmul"}:
        time = times[name]
        record[name] = {
            "median_s": time.median,
            "least_s": time.least,
            "tokens_per_s": tokens / time.median,
        }
    if compiled is not None:
        record |= {"compile_s": compiled.compile_seconds, "temp_mib": compiled.temp_mib}
        peak = timing.peak(times["matmul"])
        work = tokens * config.flops_per_token(sizes.time, training=part == "both")
        record |= {"gflop": work / 1e9, "peak_gflop_per_s": peak / 1e9, "bound_s": work / peak}
    if part in SYSTEMS[system].figure and sizes != SMALL:
        record["figure_tokens_per_s"] = SYSTEMS[system].figure[part]
        record["figure_to_ours"] = record["jaxrec"]["tokens_per_s"] / record["figure_tokens_per_s"]
    if peer is not None:
        theirs, ours = times["transformers"], times["jaxrec"]
        record["to_ours_median"] = theirs.median / ours.median
        record["to_ours_least"] = theirs.least / ours.least
    return record


def _our_call(
    model: Any, part: str, sizes: Sizes
) -> tuple[Callable[[], Any], timing.Program | None]:
    if part == "decode":
        prompt = list(range(1, sizes.prompt + 1))
        return functools.partial(
            complete,
            model,
            [prompt],
            max_new_tokens=sizes.new_tokens,
            config=SamplingConfig(temperature=0),
        ), None
    tokens, labels = _inputs(sizes)
    if part == "forward":
        program = timing.compile_program(lambda model, tokens: model(tokens)[0], model, tokens)
        return functools.partial(program.call, model, tokens), program

    def loss(model: Any, tokens: Array, labels: Array) -> Array:
        return cross_entropy(model(tokens, remat=TrainConfig.remat)[0], labels)

    program = timing.compile_program(jax.value_and_grad(loss), model, tokens, labels)
    return functools.partial(program.call, model, tokens, labels), program


def _their_call(model: Any, part: str, sizes: Sizes) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(timing.cpu_threads())
    tokens, labels = torch_peer.to_torch(*_inputs(sizes))

    def forward() -> None:
        with torch.no_grad():
            model(tokens, use_cache=False)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False).logits
        torch_peer.torch_loss(logits, labels).backward()

    def decode() -> None:
        prompt = torch.arange(1, sizes.prompt + 1)[None]
        count = sizes.new_tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )

    return {"forward": forward, "both": both, "decode": decode}[part]
