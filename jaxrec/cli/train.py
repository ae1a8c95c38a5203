"""`jaxrec train MODEL`: trains a language model on text, a solver on puzzles, or a classifier on
labelled sequences, and ends with what it has learned.
"""

import dataclasses
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxrec.config import from_dict, load_object, to_dict
from jaxrec.errors import UserError
from jaxrec.training.config import ClassifierConfig, PuzzleConfig, RunConfig, TrainConfig
from jaxrec.training.runs import config_class, read_run, tokenizer_of

HELP = """usage: jaxrec train MODEL [options]

MODEL is a configuration by import path, such as jaxrec.models.huginn:TINY, a language model, or
jaxrec.models.hrm:SUDOKU_4X4, a solver of puzzles, or jaxrec.models.sequence_classifier:DIGITS, a
classifier of sequences; `jaxrec list` shows all. --data names what it learns from: text, puzzles
such as sudoku-4x4, or labelled sequences: digits, digits-permuted or an .npz file.
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
    distributed: bool = False
    """Join other processes that run the same command, even if neither JAX_COORDINATOR_ADDRESS nor
    srun says that there are any; see docs/operations.md."""


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """MODEL, and a dataclass of the model, the training and the `Options`, see `read_run_options`.

    Raises:
      UserError: as there.
    """
    return read_run_options(argv, "train", HELP, Options())


def read_run_options(
    argv: Sequence[str], command: str, description: str, options: Any
) -> tuple[str, Any]:
    """Reads MODEL first, since its type decides which options there are.

    A file given by `--config FILE` (YAML or JSON) holds fields of the training configuration, and
    of the model under "model"; options override it.

    Args:
      argv: the arguments after the command.
      command: its name.
      description: what it prints when it is asked for help without a MODEL.
      options: further ones of the command, a dataclass with its defaults.

    Returns:
      MODEL, and a dataclass with the fields model, train and options.

    Raises:
      UserError: MODEL is missing or cannot be trained, an option is wrong, or model and data do not
        belong together.
    """
    from jaxrec.cli.main import read_arguments
    from jaxrec.models.hrm import HRMConfig
    from jaxrec.models.protocol import LanguageModelConfig
    from jaxrec.models.sequence_classifier import SequenceClassifierConfig

    if not argv or argv[0] in ("-h", "--help"):
        print(description)
        raise SystemExit(0)
    path, *rest = argv
    if path.startswith("-"):
        raise UserError(
            f"MODEL comes first: jaxrec {command} jaxrec.models.huginn:TINY {shlex.join(argv)}"
        )
    model = _model_config(path)
    trained = (LanguageModelConfig, HRMConfig, SequenceClassifierConfig)
    if isinstance(model, type) or not isinstance(model, trained):
        raise UserError(
            f"{path} is not the configuration of a language model, of a solver of puzzles or of a"
            " classifier of sequences, which are what this command trains; `jaxrec list` shows all."
        )
    rest = _with_short_data(rest)
    kind: Any = config_class(model)
    config = _config_of_run(Path(path)) if _is_run(path) else kind()
    rest = [part for word in rest for part in _split_config(word)]
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            raise UserError("--config needs a file, YAML or JSON.")
        config, model = _read_config(Path(rest[index + 1]), model, config)
        del rest[index : index + 2]
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            (
                "model",  # of parts that are one of several kinds, the kind stays
                Annotated[type(model), tyro.conf.AvoidSubcommands],
                dataclasses.field(default=model),
            ),
            (
                "train",
                Annotated[type(config), tyro.conf.arg(name="")],
                dataclasses.field(default=config),
            ),
            (
                "options",
                Annotated[type(options), tyro.conf.arg(name="")],
                dataclasses.field(default=options),
            ),
        ],
        frozen=True,
    )
    arguments.__doc__ = f"{command.capitalize()} {path}."
    read = read_arguments(arguments, rest, f"jaxrec {command} {path}")
    _check_data(path, read.train)
    return path, read


def _config_of_run(folder: Path) -> RunConfig:
    """What a run that begins with the parameters of another one has by default."""
    run, name = read_run(folder), f"{folder.resolve().name}-on"
    if isinstance(run.config, PuzzleConfig):
        return PuzzleConfig(name=name, data=run.config.data)
    if isinstance(run.config, ClassifierConfig):
        return ClassifierConfig(name=name, data=run.config.data)
    config = TrainConfig(name=name)
    return dataclasses.replace(
        config,
        time=min(config.time, run.model_config.context),
        data=dataclasses.replace(config.data, tokenizer=tokenizer_of(run)),
    )


def _check_data(path: str, config: RunConfig) -> None:
    """Refuses what a model of this kind cannot learn from."""
    from jaxrec.training.data.corpora import BUILT_IN
    from jaxrec.training.data.examples import NAMES, are_examples
    from jaxrec.training.data.puzzle_sources import SUDOKUS, are_puzzles

    kind: type[RunConfig]
    source = config.data.source  # type: ignore[attr-defined]
    if source in BUILT_IN:
        kind, said = TrainConfig, "is text"
    elif are_puzzles(source):
        kind, said = PuzzleConfig, "are puzzles"
    elif are_examples(source):
        kind, said = ClassifierConfig, "are labelled sequences"
    else:
        return
    if isinstance(config, PuzzleConfig) and kind is not PuzzleConfig:
        raise UserError(
            f"{path} solves puzzles and cannot learn from {source}, which {said}. Give"
            f" --data {', '.join(SUDOKUS)}, maze-NxN or a folder of puzzles."
        )
    if isinstance(config, ClassifierConfig) and kind is not ClassifierConfig:
        raise UserError(
            f"{path} classifies sequences and cannot learn from {source}, which {said}. Give"
            f" --data {', '.join(NAMES)}, or an .npz file of inputs and labels."
        )
    if isinstance(config, TrainConfig) and kind is not TrainConfig:
        other = "hrm:SUDOKU_4X4" if kind is PuzzleConfig else "sequence_classifier:DIGITS"
        raise UserError(
            f"{path} is a language model and cannot learn from {source}, which {said}. Train"
            f" jaxrec.models.{other}, say, or give text by --data."
        )


def run(parsed: tuple[str, Any]) -> int:
    """Trains, then prints what was learned and what to type next."""
    from jaxrec.training import hosts

    path, arguments = parsed
    if arguments.options.distributed or hosts.are_announced():
        hosts.start()
    start = Path(path) if _is_run(path) else None
    model_path = path if start is None else read_run(start).model_path
    options: dict[str, Any] = {
        "runs": arguments.options.runs,
        "resume": arguments.options.resume,
        "start": start,
        "stream": sys.stdout,
    }
    conclude: Callable[[Any, str], None]
    if isinstance(arguments.train, PuzzleConfig):
        from jaxrec.training.puzzles import train_puzzles

        conclude = _conclude_puzzles
        outcome: Any = train_puzzles(model_path, arguments.model, arguments.train, **options)
    elif isinstance(arguments.train, ClassifierConfig):
        from jaxrec.training.classifier_runs import train_classifier_run

        conclude = _conclude_classifier
        outcome = train_classifier_run(model_path, arguments.model, arguments.train, **options)
    else:
        from jaxrec.training.loop import train

        conclude = _conclude
        outcome = train(model_path, arguments.model, arguments.train, sample=_sample, **options)
    if not hosts.is_first():
        return 0
    folder = outcome.run.folder
    if outcome.stopped_by is not None:
        print(
            f"{outcome.stopped_by}: saved step {outcome.step} in {folder}. Go on with:\n"
            f"  {command_line(path, arguments)}"
        )
        return 0
    longer = dataclasses.replace(arguments.train, steps=2 * arguments.train.steps)
    conclude(outcome, command_line(path, dataclasses.replace(arguments, train=longer)))
    return 0


def _conclude_puzzles(outcome: Any, go_on: str) -> None:
    from jaxrec.cli.main import program
    from jaxrec.training import puzzle_report, running

    run, scores = outcome.run, outcome.evaluation
    running.write_scores(outcome)
    print(
        f"\n{scores.puzzles} held-out puzzles ({run.data['source']}) after {outcome.step} steps:\n"
        f"{puzzle_report.table(scores)}"
    )
    picture = puzzle_report.plot_puzzle_curves(run.folder)
    print(_curves(picture))
    average = "" if run.config.optimizer.ema_decay is None else " --ema"
    where = shlex.quote(str(run.folder))
    print(f"See one:   {program()} eval {where}{average} --show")
    print(f"Evaluate:  {program()} eval {where}{average}")
    print(f"Go on:     {go_on}")


def _conclude_classifier(outcome: Any, go_on: str) -> None:
    from jaxrec.cli.main import program
    from jaxrec.training import classifier_report, running

    run, scores = outcome.run, outcome.evaluation
    running.write_scores(outcome)
    print(
        f"\n{scores.examples} held-out examples ({run.data['source']}) after {outcome.step} steps:"
        f" {scores}"
    )
    print(_curves(classifier_report.plot_classifier_curves(run.folder)))
    average = "" if run.config.optimizer.ema_decay is None else " --ema"
    print(f"Evaluate:  {program()} eval {shlex.quote(str(run.folder))}{average}")
    print(f"Go on:     {go_on}")


def _curves(picture: Path | None) -> str:
    if picture is None:
        return "No curves: matplotlib is missing (extra notebooks)."
    return f"Curves: {picture}"


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
        note = "  <- the model's own depth" if depth == str(mean) else ""
        print(f"  {name:<20}{bits:7.3f}{note}")
    for name, bits in report["baselines"]["bits_per_byte"].items():
        print(f"  {name:<20}{bits:7.3f}")
    if outcome.model is not None:
        sample = _sample(outcome.model, outcome.data.tokenizer)
        with (folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {outcome.step}\n{sample}\n")
        print(f"\nSample:\n{sample}\n")
    print(_curves(plot_curves(folder)))
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
            " --precision bfloat16 --mesh data=8    # on eight devices"
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
    pairs += _differences(arguments.train, type(arguments.train)(), "")
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


def _read_config(file: Path, model: Any, config: RunConfig) -> tuple[RunConfig, Any]:
    """The configurations of the run and the model with what the file changes in them."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot be read ({error}).") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # also of dates that are none
        raise UserError(f"--config {file}: {error}") from error
    changes = content.pop("model", {}) if isinstance(content, dict) else None
    if not isinstance(changes, dict):
        raise UserError(
            f"--config {file}: expected fields of the training configuration, and under 'model'"
            " fields of the model."
        )
    run = from_dict(type(config), _merged(to_dict(config), content))
    return run, from_dict(type(model), to_dict(model) | changes, where="model.")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Fields of nested configurations, the new ones where there are such."""
    nested = {
        name: _merged(old[name], value)
        for name, value in new.items()
        if isinstance(value, dict) and isinstance(old.get(name), dict)
    }
    return old | new | nested
