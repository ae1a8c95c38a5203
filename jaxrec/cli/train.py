"""`jaxrec train MODEL`: trains a language model on text, and ends with what it has learned."""

import dataclasses
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxrec.config import from_dict, load_object
from jaxrec.errors import UserError
from jaxrec.training.config import TrainConfig
from jaxrec.training.runs import read_run, tokenizer_of

HELP = """usage: jaxrec train MODEL [options]

MODEL is a configuration by import path, such as jaxrec.models.huginn:TINY; `jaxrec list` shows all.
Or it is the folder of a run, made by `jaxrec convert`, say, with whose parameters a new one begins.
Its fields are options --model.FIELD; `jaxrec train MODEL --help` lists them with the others.
--config FILE reads options from YAML or JSON, with the model's fields under "model"."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run lies, and how it begins."""

    runs: Path = Path("runs")
    """Folder of all runs."""
    resume: bool = False
    """Insist that the run exists. Without it a run is resumed if its folder holds one."""


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Reads MODEL first, since its type decides which options there are.

    A file given by `--config FILE` (YAML or JSON) holds fields of the training configuration, and
    of the model under "model"; options override it.
    """
    from jaxrec.cli.main import read_arguments
    from jaxrec.models.protocol import LanguageModelConfig

    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0)
    path, *rest = argv
    if path.startswith("-"):
        raise UserError(
            f"MODEL comes first: jaxrec train jaxrec.models.huginn:TINY {shlex.join(argv)}"
        )
    model = _model_config(path)
    if isinstance(model, type) or not isinstance(model, LanguageModelConfig):
        raise UserError(
            f"{path} is not the configuration of a language model, which are what this command"
            " trains; `jaxrec list` shows all."
        )
    config, rest = TrainConfig(), _with_short_data(rest)
    if _is_run(path):
        config = dataclasses.replace(
            config,
            name=f"{Path(path).resolve().name}-on",
            time=min(config.time, model.context),
            data=dataclasses.replace(config.data, tokenizer=tokenizer_of(read_run(Path(path)))),
        )
    rest = [part for word in rest for part in _split_config(word)]
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            raise UserError("--config needs a file, YAML or JSON.")
        config, model = _read_config(Path(rest[index + 1]), model)
        del rest[index : index + 2]
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("model", type(model), dataclasses.field(default=model)),
            (
                "train",
                Annotated[TrainConfig, tyro.conf.arg(name="")],
                dataclasses.field(default=config),
            ),
            (
                "options",
                Annotated[Options, tyro.conf.arg(name="")],
                dataclasses.field(default=Options()),
            ),
        ],
        frozen=True,
    )
    arguments.__doc__ = f"Train {path}."
    return path, read_arguments(arguments, rest, f"jaxrec train {path}")


def run(parsed: tuple[str, Any]) -> int:
    """Trains, then prints the table, a sample and what to type next."""
    from jaxrec.training.loop import train

    path, arguments = parsed
    start = Path(path) if _is_run(path) else None
    outcome = train(
        path if start is None else read_run(start).model_path,
        arguments.model,
        arguments.train,
        runs=arguments.options.runs,
        resume=arguments.options.resume,
        start=start,
        sample=_sample,
        stream=sys.stdout,
    )
    folder = outcome.run.folder
    if outcome.stopped_by is not None:
        print(
            f"{outcome.stopped_by}: saved step {outcome.step} in {folder}. Go on with:\n"
            f"  {command_line(path, arguments)}"
        )
        return 0
    longer = dataclasses.replace(arguments.train, steps=2 * arguments.train.steps)
    _conclude(outcome, command_line(path, dataclasses.replace(arguments, train=longer)))
    return 0


def _conclude(outcome: Any, go_on: str) -> None:
    from jaxrec.cli.main import program
    from jaxrec.training.report import plot_curves, write_report

    run, folder = outcome.run, outcome.run.folder
    report = write_report(outcome)
    mean = run.model_config.mean_depth
    print(f"\nValidation bits per byte after {outcome.step} steps ({run.data['source']}):")
    print(
        f"(model: {report['tokens']:,} tokens in windows of {run.config.time} spread over the text,"
        " each from an empty context;"
        f"\n gzip and the byte model: {report['baselines']['bytes']:,} bytes in a row)"
    )
    for depth, bits in report["bits_per_byte"].items():
        name = "model" if depth == "-" else f"depth {depth}"
        note = "  <- mean depth in training" if depth == str(mean) else ""
        print(f"  {name:<20}{bits:7.3f}{note}")
    for name, bits in report["baselines"]["bits_per_byte"].items():
        print(f"  {name:<20}{bits:7.3f}")
    sample = _sample(outcome.model, outcome.data.tokenizer)
    with (folder / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- step {outcome.step}\n{sample}\n")
    print(f"\nSample:\n{sample}\n")
    picture = plot_curves(folder)
    print(
        f"Curves: {picture}" if picture else "No curves: matplotlib is missing (extra notebooks)."
    )
    options = "" if mean is None else f" --depth {2 * mean}"
    average = "" if run.config.optimizer.ema_decay is None else " --ema"
    where = shlex.quote(str(folder))
    print(f"Generate:  {program()} generate {where}{average} --prompt 'def '{options}")
    print(f"Evaluate:  {program()} eval {where}{average}")
    print(f"Go on:     {go_on}")
    module, has_sizes, _ = run.model_path.partition(":")
    if has_sizes and hasattr(importlib.import_module(module), "SMALL"):
        source = shlex.quote(run.config.data.source)
        print(
            f"Scale up:  {program()} train {module}:SMALL --data {source}"
            " --precision bfloat16 --mesh data=8"
        )


def _sample(model: Any, tokenizer: Any, tokens: int = 200) -> str:
    """The beginning of a document as the model would write it."""
    import jax

    from jaxrec import generation

    key, latent_key = jax.random.split(jax.random.key(0))
    prompt = [tokenizer.bos] if tokenizer.bos is not None else tokenizer.encode("The ").tolist()
    (ids,) = generation.complete(
        model,
        [prompt],
        max_new_tokens=min(tokens, model.config.context - len(prompt)),
        config=generation.SamplingConfig(temperature=0.8),
        key=key,
        latent_key=latent_key,
    )
    return tokenizer.decode(ids).decode("utf-8", errors="replace")


def command_line(path: str, arguments: Any) -> str:
    """The command that gives these arguments: MODEL, and the options that are not the defaults."""
    from jaxrec.cli.main import program

    pairs = _differences(arguments.model, _model_config(path), "model.")
    pairs += _differences(arguments.train, TrainConfig(), "")
    pairs += _differences(arguments.options, Options(), "")
    words = []
    for name, value in pairs:
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            head, dot, tail = flag.rpartition(".")
            words.append(flag if value else f"{head}{dot}no-{tail}" if dot else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return f"{program()} train {shlex.join([path, *words])}"


def _is_run(path: str) -> bool:
    """Whether MODEL is the folder of a run."""
    return (Path(path) / "run.json").exists()


def _model_config(path: str) -> Any:
    """The configuration that MODEL names."""
    return read_run(Path(path)).model_config if _is_run(path) else load_object(path)


def _differences(config: Any, default: Any, prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            pairs += _differences(value, usual, f"{prefix}{field.name}.")
        elif value != usual:
            pairs.append((prefix + field.name, value))
    return pairs


def _with_short_data(argv: Sequence[str]) -> list[str]:
    """`--data X` is what everybody types for --data.source X."""
    return [
        "--data.source" + arg[6:] if arg == "--data" or arg.startswith("--data=") else arg
        for arg in argv
    ]


def _split_config(word: str) -> list[str]:
    """`--config=FILE` as two words."""
    return ["--config", word[9:]] if word.startswith("--config=") else [word]


def _read_config(file: Path, model: Any) -> tuple[TrainConfig, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read ({error}).") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file}: {error}") from error
    changes = content.pop("model", {}) if isinstance(content, dict) else None
    if not isinstance(changes, dict):
        raise UserError(
            f"--config {file}: expected fields of the training configuration, and under 'model'"
            " fields of the model."
        )
    known = dataclasses.asdict(model)
    return from_dict(TrainConfig, content), from_dict(type(model), known | changes, where="model.")
