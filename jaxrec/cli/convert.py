"""`jaxrec convert SYSTEM FROM TO`: a published checkpoint becomes a run, or, with --export, a run a
checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """With --export: what the numbers are written as."""


def run(arguments: Arguments) -> int:
    """Converts, and says what to type next.

    Raises:
      UserError: the checkpoint does not fit the table, or the target exists.
    """
    from jaxrec import convert
    from jaxrec.cli.main import program
    from jaxrec.models.hrm import HRM
    from jaxrec.training.data import TOKENIZER_FILE, load_tokenizer
    from jaxrec.training.runs import read_run, trained_model

    if arguments.export:
        model, step = trained_model(read_run(arguments.source), step=arguments.step)
        has_file = (arguments.source / TOKENIZER_FILE).exists()
        tokenizer = load_tokenizer(arguments.source) if has_file else None
        convert.export(model, arguments.target, arguments.system, dtype=arguments.dtype)
        if tokenizer is not None:
            tokenizer.save(arguments.target)
        print(f"Wrote {arguments.target} from step {step} of {arguments.source}.")
        return 0
    if arguments.target.exists() and any(arguments.target.iterdir()):
        raise UserError(f"{arguments.target} is not empty; choose a new run folder.")
    model = convert.load(arguments.system, arguments.source)
    next_words = f"generate {arguments.target} --prompt '...'"
    if isinstance(model, HRM):
        next_words = f"eval {arguments.target} --data FOLDER"
        _write_solver(arguments, model)
    else:
        _write_run(arguments, model)
    print(f"Wrote {arguments.target}. Try: {program()} {next_words}")
    return 0


def _write_solver(arguments: Arguments, model: Any) -> None:
    from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
    from jaxrec.training.data.puzzle_sources import made_like

    if arguments.tokenizer is not None:
        raise UserError("A solver of puzzles reads no text; leave --tokenizer out.")
    config = model.config
    source = made_like(config.length, config.vocab_size) or "sudoku-4x4"
    training = PuzzleConfig(data=PuzzleDataConfig(source=source))
    _save(arguments, model, training, {"source": str(arguments.source), "sha256": None}, None)


def _write_run(arguments: Arguments, model: Any) -> None:
    from jaxrec.models.protocol import LanguageModelConfig
    from jaxrec.training.config import DataConfig, TrainConfig
    from jaxrec.training.data import load_tokenizer

    beside = arguments.source / "tokenizer.json"
    tokenizer = load_tokenizer(arguments.tokenizer or (str(beside) if beside.exists() else "bytes"))
    config = model.config
    if not isinstance(config, LanguageModelConfig):
        raise UserError(
            f"{arguments.source} holds {type(model).__name__}, which is not a language model or a"
            " solver of puzzles, so there is no run to write; in Python, use"
            f" jaxrec.convert.load({arguments.system!r}, ...)."
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model"
            f" {config.vocab_size}; give the one it was trained with by --tokenizer."
        )
    training = TrainConfig(time=min(256, config.context), data=DataConfig(tokenizer=tokenizer.name))
    provenance = {
        "source": str(arguments.source),
        "tokenizer": tokenizer.name,
        "sha256": None,
        "stop_tokens": _stop_tokens(arguments, config),
    }
    _save(arguments, model, training, provenance, tokenizer)


def _stop_tokens(arguments: Arguments, config: Any) -> list[int]:
    """Where the original ends a text: as its files say, and as its program does."""
    from jaxrec.config import read_json
    from jaxrec.convert import engine

    found: list[Any] = [*engine.find(arguments.system).stop_tokens(config)]
    for name in ("config.json", "generation_config.json"):
        file = arguments.source / name
        data = read_json(file) if file.exists() else {}
        ends = data.get("eos_token_id") if isinstance(data, dict) else None
        found += ends if isinstance(ends, list) else [ends]
    return sorted({i for i in found if type(i) is int and 0 <= i < config.vocab_size})


def _save(
    arguments: Arguments, model: Any, training: Any, provenance: dict[str, Any], tokenizer: Any
) -> None:
    """Writes the folder of a run that has made no step."""
    from flax import nnx

    from jaxrec.training.checkpoint import Checkpoints
    from jaxrec.training.runs import Run

    target, path = arguments.target, f"jaxrec.convert.{arguments.system}"
    Run(target, path, model.config, training, provenance).write(tokenizer)
    with Checkpoints(target / "checkpoints") as checkpoints:
        checkpoints.save(
            0, {"params": nnx.to_pure_dict(nnx.split(model)[1])}, {"from": str(arguments.source)}
        )
