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
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.cli import bench, timing
from jaxrec.cli.timing import WrongNumbers
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.generation import SamplingConfig, complete
from jaxrec.models.mamba import MambaConfig
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.training.losses import cross_entropy
from jaxrec.training.sharding import build_mesh

PEERS = {"mamba": "Mamba", "recurrentgemma": "RecurrentGemma"}
"""System -> the stem of the class names in transformers."""
TOLERANCE = 1e-5
"""Largest difference between the two programs, both in float32, relative to the largest value of an
array. Measured: up to 2e-6."""


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
            check_peer(peer, system)
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
                report["results"].append(measure(system, part, sizes, rounds, peer))
                timing.say(f"{system}: {part} timed")
    report["machine"]["load_average_after"] = timing.load_average()
    timing.publish(report, tables, as_json=arguments.json, out=arguments.out)


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


def check_peer(peer: Any, system: str) -> None:
    """Compares transformers with jaxrec from equal weights: logits and every gradient.

    Raises:
      WrongNumbers: they differ; the message names what.
    """
    for what, error in peer_errors(peer, system).items():
        if not error <= TOLERANCE:  # also refuses NaN
            raise WrongNumbers(
                f"{PEERS[system]} of transformers and jaxrec differ: {what} by {error:.1e} of the"
                f" largest value, allowed are {TOLERANCE:.0e}."
            )


def peer_errors(peer: Any, system: str) -> dict[str, float]:
    """Largest difference of the logits and of each gradient, relative to their largest value."""
    model = SMALL.model(system).build(rngs=nnx.Rngs(0))
    tokens, labels = _inputs(SMALL)

    def loss(model: Any) -> tuple[Array, Array]:
        logits = model(tokens)[0]
        return cross_entropy(logits, labels), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    theirs = peer_model(peer, system, model)
    their_logits, their_loss = _torch_loss(theirs, *_to_torch(tokens, labels))
    their_loss.backward()
    their_gradient = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    def error(value: np.ndarray, their_value: np.ndarray) -> float:
        return float(np.max(np.abs(value - their_value)) / np.max(np.abs(their_value)))

    errors = {"the logits": error(np.asarray(logits), their_logits.detach().numpy())}
    for name, value in engine.to_tensors(engine.find(system), model, gradient).items():
        errors[f"the gradient of {name}"] = error(value, their_gradient[name])
    return errors


def _inputs(sizes: Sizes) -> tuple[Array, Array]:
    """Tokens and labels (b t)."""
    shape = (sizes.batch, sizes.time)
    first, second = jax.random.split(jax.random.key(0))
    return tuple(  # type: ignore[return-value]
        jax.random.randint(key, shape, 0, sizes.vocab_size, jnp.int32) for key in (first, second)
    )


def _to_torch(*arrays: Array) -> list[Any]:
    import torch

    return [torch.from_numpy(np.array(x)).long() for x in arrays]


def _torch_loss(model: Any, tokens: Any, labels: Any) -> tuple[Any, Any]:
    import torch

    logits = model(tokens, use_cache=False).logits
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


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
    tokens, labels = _to_torch(*_inputs(sizes))

    def forward() -> None:
        with torch.no_grad():
            model(tokens, use_cache=False)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        _torch_loss(model, tokens, labels)[1].backward()

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


def tables(report: dict[str, Any]) -> list[Any]:
    """One table."""
    from rich.table import Table

    sizes = report["sizes"]
    made = Table(
        title=f"width {sizes['width']}, {sizes['layers']} layers, vocabulary"
        f" {sizes['vocab_size']}, batch {sizes['batch']} x {sizes['time']}, MLP"
        f" {sizes['mlp_width']}; decoding at batch 1; transformers"
        f" {report['transformers'] or 'not installed'}"
    )
    for column in (
        "model",
        "what",
        "tokens/s",
        "s: median (least)",
        "transformers tokens/s",
        "transformers s",
        "transformers / ours",
        "compile s",
        "temp MiB",
    ):
        made.add_column(column, justify="right")
    for x in report["results"]:
        row = [x["system"], "forward + backward" if x["part"] == "both" else x["part"]]
        for name in ("jaxrec", "transformers"):
            if name not in x:
                row += ["-", "-"]
                continue
            time = x[name]
            row += [
                f"{time['tokens_per_s']:,.0f}",
                f"{time['median_s']:.3f} ({time['least_s']:.3f})",
            ]
        ratio = "-"
        if "to_ours_median" in x:
            ratio = f"{x['to_ours_median']:.2f} ({x['to_ours_least']:.2f})"
        row.append(ratio)
        row += [f"{x['compile_s']:.1f}", f"{x['temp_mib'] or 0:.0f}"] if "compile_s" in x else "--"
        made.add_row(*row)
    return [made]
