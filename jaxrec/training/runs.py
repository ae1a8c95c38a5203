"""The folder of a run: what was trained, on what, and how to get the model back.

runs/<name>/run.json        model and training configuration, data provenance, versions
           /metrics.jsonl   one line per interval
           /checkpoints/    by step
           /checkpoints-damaged/  those that could not be read, moved there when a run went on
           /tokenizer.json  a copy of the one that was used, if text was read and it has a file
           /samples.txt  curves.png  report.json
           /lock            held by the process that writes here, see `jaxrec.training.lock`
           /bad_batch.npz   after a loss that is not finite
"""

import dataclasses
import importlib.metadata
import json
import operator
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

import jaxrec
from jaxrec.config import from_dict, load_object, read_json, to_dict
from jaxrec.errors import UserError
from jaxrec.models.hrm import HRMConfig
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import ClassifierConfig, PuzzleConfig, RunConfig, TrainConfig
from jaxrec.training.data import TOKENIZER_FILE, Tokenizer, load_tokenizer

RUN_LAYOUT = 1
"""Version of run.json; a folder of another version is refused."""
TRUSTED = "JAXREC_TRUSTED_MODULES"
"""Environment variable: modules, with commas between, that a run.json may have imported."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What run.json says."""

    folder: Path
    model_path: str  # such as "jaxrec.models.huginn:TINY", from which the run was launched
    model_config: Any  # of a language model, a solver of puzzles or a classifier of sequences
    config: Any  # of the kind that `config_class` says
    data: dict[str, Any]  # provenance

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def write(self, tokenizer: Tokenizer | None = None) -> None:
        """Writes the tokenizer's files, if text is read, then run.json as a whole or not at all."""
        kind = type(self.model_config)
        content = {
            "layout": RUN_LAYOUT,
            "model": self.model_path,
            "model_class": f"{kind.__module__}:{kind.__qualname__}",
            "model_config": to_dict(self.model_config),
            "train": to_dict(self.config),
            "data": self.data,
            "versions": versions(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(self.folder)
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, self.folder / "run.json")


def config_class(model_config: Any) -> type[RunConfig]:
    """What a run of such a model is configured by."""
    if isinstance(model_config, SequenceClassifierConfig):
        return ClassifierConfig
    return PuzzleConfig if isinstance(model_config, HRMConfig) else TrainConfig


def read_run(folder: Path) -> Run:
    """Reads run.json.

    Raises:
      UserError: the folder is no run, of another layout version, or its configuration is not
        understood.
    """
    file = folder / "run.json"
    if not file.is_file():
        hint = _runs_beside(folder)
        raise UserError(f"{folder} is not a run folder: it holds no run.json.{hint}")
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}). Restore it, or start a new run.") from error
    if not isinstance(content, dict) or "layout" not in content:
        raise UserError(f"{file} is damaged: it has no layout. Restore it, or start a new run.")
    layout = content["layout"]
    if layout != RUN_LAYOUT:
        versions = content.get("versions")
        made = versions.get("jaxrec") if isinstance(versions, dict) else None
        raise UserError(
            f"{folder} has run layout {layout}; this jaxrec reads {RUN_LAYOUT}."
            f" Use the version it was made with: {made}."
        )
    kinds = {"model": str, "model_class": str, "model_config": dict, "train": dict, "data": dict}
    for name, wanted in kinds.items():
        if name not in content:
            raise UserError(f"{file} lacks the field '{name}'. Restore it, or start a new run.")
        if not isinstance(content[name], wanted):
            raise UserError(
                f"{file}: {name} must be a {wanted.__name__}, got {content[name]!r}. Restore it, or"
                " start a new run."
            )
    model_config: Any = from_dict(
        _model_class(file, content["model_class"]), content["model_config"]
    )
    return Run(
        folder,
        content["model"],
        model_config,
        from_dict(config_class(model_config), content["train"]),
        content["data"],
    )


def _model_class(file: Path, path: str) -> type[Any]:
    """The class of a model's configuration. To import a module is to run it, so a file may name
    only modules of jaxrec, those already imported, and those that the user trusts by name.

    Raises:
      UserError: it is another module, or no such class.
    """
    module = path.partition(":")[0]
    trusted = os.environ.get(TRUSTED, "").split(",")
    known = module.startswith("jaxrec.") or module in sys.modules or module in trusted
    if not known:
        raise UserError(
            f"{file} asks for code from the module {module!r}, which is not of jaxrec, so it was"
            f" not run. If you trust it, set {TRUSTED}={module}."
        )
    found = load_object(path)
    if not (
        isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "build")
    ):
        raise UserError(f"{file}: {path} is no configuration of a model. Restore it.")
    return found


def check_same_run(old: Run, new: Run) -> None:
    """Refuses to go on in a folder that holds another run.

    Raises:
      UserError: model, data or a field of `config.FIXED` differ; the message names what.
    """
    advice = "Choose another --name, or repeat the options of the run that is there."
    if type(old.model_config) is not type(new.model_config) or old.model_config != new.model_config:
        raise UserError(
            f"{old.folder} holds a run of another model, {old.model_path}"
            f"{_first_difference(old.model_config, new.model_config)}. {advice}"
        )
    pairs = [
        (name, *(operator.attrgetter(name)(run.config) for run in (old, new)))
        for name in new.config.FIXED
    ]
    optimizers = (to_dict(old.config.optimizer), to_dict(new.config.optimizer))
    pairs += [
        (f"optimizer.{name}", value, optimizers[1][name]) for name, value in optimizers[0].items()
    ]
    pairs += [
        (f"data {name}", old.data.get(name), new.data.get(name))
        for name in ("sha256", "tokenizer", "valid_fraction", "tokens")
    ]
    for name, there, here in pairs:
        if there != here:
            raise UserError(
                f"{old.folder} holds a run with {name} {there}; this one has {here}. {advice}"
            )


class Loaded(NamedTuple):
    """A trained language model and what belongs to it."""

    model: Any
    tokenizer: Tokenizer
    run: Run
    step: int  # updates made


def load_model(folder: Path, *, step: int | None = None, ema: bool = False) -> Loaded:
    """Loads a trained language model for use on one device.

    Args:
      folder: the run.
      step: which checkpoint; the newest if None.
      ema: the running average instead of the parameters.

    Returns:
      The model, its tokenizer, what run.json says, and the step; unpacks as a tuple.

    Raises:
      UserError: the folder is no run of a language model or holds no such checkpoint, or the
        checkpoint is damaged.
    """
    run = read_run(folder)
    if isinstance(run.config, PuzzleConfig):
        raise UserError(
            f"{folder} is the run of a solver of puzzles, which reads no text;"
            f" `jaxrec eval {folder} --show` lets it solve one."
        )
    if isinstance(run.config, ClassifierConfig):
        raise UserError(
            f"{folder} is the run of a classifier, which reads no text; `jaxrec eval {folder}` says"
            " how often it is right."
        )
    tokenizer = load_tokenizer(tokenizer_of(run))
    model, step = trained_model(run, step=step, ema=ema)
    return Loaded(model, tokenizer, run, step)


def trained_model(run: Run, *, step: int | None = None, ema: bool = False) -> tuple[Any, int]:
    """The model of any run on one device, and the step; arguments and errors as of `load_model`."""
    graph, variables = nnx.split(nnx.eval_shape(lambda: run.model_config.build(rngs=nnx.Rngs(0))))
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.to_pure_dict(variables)
    )
    with Checkpoints(run.checkpoints, keep=None, read_only=True) as checkpoints:
        there = checkpoints.steps()
        if not there:
            raise UserError(f"{run.folder} has no checkpoint yet. Train it first: jaxrec train.")
        step = there[-1] if step is None else step
        if step not in there:
            raise UserError(f"{run.folder} has no checkpoint of step {step}. It has: {there}.")
        params = checkpoints.restore_params(step, abstract, average=ema)
    return nnx.merge(graph, params), step


def tokenizer_of(run: Run) -> str:
    """How `load_tokenizer` finds the tokenizer of a run: the copy in its folder if there is one.

    Raises:
      UserError: there is none, and run.json names none.
    """
    if (run.folder / TOKENIZER_FILE).exists():
        return str(run.folder)
    name = run.data.get("tokenizer")
    if not isinstance(name, str):
        raise UserError(
            f"{run.folder} holds no {TOKENIZER_FILE}, and its run.json names no tokenizer. Put the"
            " one that the model reads there."
        )
    return name


def stop_tokens_of(run: Run, tokenizer: Tokenizer) -> list[int]:
    """Tokens before which a generated text ends: what begins the next document or ends this one, by
    the tokenizer and by the checkpoint that the run was converted from.

    Raises:
      UserError: run.json has something else than tokens there.
    """
    said = run.data.get("stop_tokens", [])
    if not isinstance(said, list) or not all(type(token) is int for token in said):
        raise UserError(
            f"{run.folder}/run.json: data.stop_tokens must be a list of tokens, got {said!r}."
        )
    own = [token for token in (tokenizer.bos, tokenizer.eos) if token is not None]
    return sorted({*own, *said})


def versions() -> dict[str, str]:
    """Versions of what computes: recorded with every result."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "jaxrec": jaxrec.__version__, **found}


def _first_difference(old: Any, new: Any) -> str:
    if type(old) is not type(new):
        return ""
    old, new = to_dict(old), to_dict(new)
    name = next(name for name in old if old[name] != new[name])
    return f" with {name} {old[name]}; this one has {new[name]}"


def _runs_beside(folder: Path) -> str:
    if not folder.parent.is_dir():
        return " `jaxrec train` makes one under runs/."
    names = sorted(other.parent.name for other in folder.parent.glob("*/run.json"))
    return f" In {folder.parent} there are: {', '.join(names)}." if names else ""
