"""`jaxrec bench models`: recurrent language models forward, with their gradient, and decoding,
beside the same models of transformers in PyTorch.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.cli import bench, timing, torch_peer
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.training.losses import cross_entropy
from jaxrec.training.sharding import build_mesh

PEERS = {"mamba": "Mamba", "recurrentgemma": "RecurrentGemma"}
"""System -> the stem of the class names in transformers."""


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

    def model(self, system: str) -> MambaConfig | RecurrentGemmaConfig:
        """The configuration of a system."""
        if system == "mamba":
            return MambaConfig(
                vocab_size=self.vocab_size,
                width=self.width,
                layers=self.layers,
                inner_width=2 * self.width,
                step_rank=-(-self.width // 16),
            )
        return RecurrentGemmaConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            recurrent_width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            layers=self.layers,
            window=2048,
            context=8192,
        )


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
            torch_peer.refuse_differences(f"{PEERS[system]} of transformers", differences)
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
                beside = peer if part in arguments.beside else None
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
        for stem in PEERS.values():  # classes are imported when they are first named
            getattr(transformers, f"{stem}ForCausalLM")
    return transformers


def peer_model(peer: Any, system: str, model: Any) -> Any:
    """The model of transformers with the weights of ours."""
    import torch

    table = engine.find(system)
    stem = PEERS[system]
    config = getattr(peer, f"{stem}Config")(**table.write_config(model.config))
    theirs = getattr(peer, f"{stem}ForCausalLM")(config).eval()
    tensors = engine.to_tensors(table, model)
    repeated = table.repeated(model.config)
    tensors |= {name: tensors[other] for name, other in repeated.items()}
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()})
    return theirs


def peer_differences(peer: Any, system: str) -> dict[str, float]:
    """What `torch_peer.differences` finds at a small size, from equal weights."""
    model = SMALL.model(system).build(rngs=nnx.Rngs(0))
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
    model = sizes.model(system).build(rngs=nnx.Rngs(0))
    call, compiled = _our_call(model, part, sizes)
    calls = {"jaxrec": call}
    if peer is not None:
        calls["transformers"] = _their_call(peer_model(peer, system, model), part, sizes)
    times = timing.race(calls, rounds)
    tokens = sizes.new_tokens if part == "decode" else sizes.batch * sizes.time
    record: dict[str, Any] = {"system": system, "part": part, "tokens": tokens}
    for name, time in times.items():
        record[name] = {
            "median_s": time.median,
            "least_s": time.least,
            "tokens_per_s": tokens / time.median,
        }
    if compiled is not None:
        record |= {"compile_s": compiled.compile_seconds, "temp_mib": compiled.temp_mib}
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
        return cross_entropy(model(tokens)[0], labels)

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
