"""`jaxrec convert SYSTEM FROM TO`: a published checkpoint becomes a run, or, with --export, a run a
checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read a published checkpoint into a run folder, or write one from a run."""

    system: tyro.conf.Positional[str]
    """Which table to use, such as huginn; `jaxrec list` shows which models have one."""
    source: tyro.conf.Positional[Path]
    """Directory with config.json and safetensors; with --export, the run folder."""
    target: tyro.conf.Positional[Path]
    """New run folder; with --export, the directory to write."""
    export: bool = False
    """Go from a run to the published format."""
    tokenizer: str | None = None
    """bytes or a tokenizer.json; the source's own tokenizer.json if left out and there, else
    bytes."""
    step: int | None = None
    """With --export: which checkpoint; the newest if left out."""


def run(arguments: Arguments) -> int:
    """Converts, and says what to type next.

    Raises:
      UserError: the checkpoint does not fit the table, or the target exists.
    """
    from jaxrec import convert
    from jaxrec.cli.main import program
    from jaxrec.training.runs import load_model

    if arguments.export:
        loaded = load_model(arguments.source, step=arguments.step)
        convert.export(loaded.model, arguments.target, arguments.system)
        print(f"Wrote {arguments.target} from step {loaded.step} of {arguments.source}.")
        return 0
    _write_run(arguments, convert.load(arguments.system, arguments.source))
    print(f"Wrote {arguments.target}. Try: {program()} generate {arguments.target} --prompt '...'")
    return 0


def _write_run(arguments: Arguments, model: object) -> None:
    from flax import nnx

    from jaxrec.models.protocol import LanguageModelConfig
    from jaxrec.training.checkpoint import Checkpoints
    from jaxrec.training.config import DataConfig, TrainConfig
    from jaxrec.training.data import load_tokenizer
    from jaxrec.training.runs import Run

    target = arguments.target
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose a new run folder.")
    beside = arguments.source / "tokenizer.json"
    tokenizer = load_tokenizer(arguments.tokenizer or (str(beside) if beside.exists() else "bytes"))
    config = model.config  # type: ignore[attr-defined]
    if not isinstance(config, LanguageModelConfig):
        raise UserError(
            f"{arguments.source} holds {type(model).__name__}, which is not a language model, so"
            " there is no run to write; in Python, use"
            f" jaxrec.convert.load({arguments.system!r}, ...)."
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model"
            f" {config.vocab_size}; give the one it was trained with by --tokenizer."
        )
    training = TrainConfig(time=min(256, config.context), data=DataConfig(tokenizer=tokenizer.name))
    provenance = {"source": str(arguments.source), "tokenizer": tokenizer.name, "sha256": None}
    Run(target, f"jaxrec.convert.{arguments.system}", config, training, provenance).write(tokenizer)
    with Checkpoints(target / "checkpoints") as checkpoints:
        checkpoints.save(
            0, {"params": nnx.to_pure_dict(nnx.split(model)[1])}, {"from": str(arguments.source)}
        )
