"""What a run reports: JSON lines in its folder, and TensorBoard or Weights & Biases on request."""

import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxrec.errors import UserError

NOT_FINITE = {"nan", "inf", "-inf"}
"""How numbers that JSON cannot hold are written: as these strings, which `float` reads."""


class MetricsLog:
    """Writes metrics to <folder>/metrics.jsonl, one object per line, each complete as soon as it is
    logged.

    Every line has "step", "kind" and "time" (seconds since 1970). Kinds are "train", "valid",
    "model" for what a model says of itself, and "monitor" for what is watched inside of it.
    Values are numbers, strings, None, or lists and dictionaries of them; numpy and jax scalars
    become numbers.

    Args:
      folder: the run folder; made when missing.
      tensorboard: also write event files to <folder>/tensorboard.
      wandb: also log to this Weights & Biases project; None does not.
      config: noted with the Weights & Biases run.
      write: False writes nothing at all, as on all but one of several hosts.

    Raises:
      UserError: tensorboard or wandb is asked for and its package is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> None:
        folder = Path(folder)
        self._writers: list[_TensorBoard | _WeightsAndBiases] = []
        self.path = folder / "metrics.jsonl" if write else Path(os.devnull)
        if not write:
            self._file = self.path.open("ab", buffering=0)
            return
        if tensorboard:
            self._writers.append(_TensorBoard(folder))
        if wandb:
            self._writers.append(_WeightsAndBiases(folder, wandb, config))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # nothing waits in memory

    def log(self, step: int, values: Mapping[str, Any], *, kind: str = "train") -> None:
        """Appends one line.

        Raises:
          UserError: it cannot be written (disk full, say).
        """
        plain = {name: _plain(value) for name, value in values.items()}
        line = {"step": int(step), "kind": kind, "time": round(time.time(), 3)} | plain
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise UserError(
                f"Could not write to {self.path} ({error.strerror}). Make room, then resume."
            ) from error
        for writer in self._writers:
            writer.log(int(step), {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Closes all files; logging is over."""
        self._file.close()
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl; strings in NOT_FINITE become numbers again.

    A last line that a killed run left half written is dropped.

    Raises:
      UserError: another line is damaged.
    """
    return [_numbers(line) for _, line in _lines(Path(path))]


def report(
    log: MetricsLog, stream: TextIO | None, step: int, values: Mapping[str, float], kind: str
) -> None:
    """Logs a line, and writes it as text to a stream, if there is one."""
    log.log(step, values, kind=kind)
    if stream is not None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        stream.write(f"step {step}  {text}\n")


def truncate_after(path: str | Path, step: int) -> None:
    """Removes the lines beyond a step, and a half-written last one; before logging again after a
    resume.

    The file is replaced in one move, so that a crash leaves the old or the new one. No file is no
    error.

    Raises:
      UserError: a line that is not the last is damaged.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [text for text, line in _lines(path) if line["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a file, as text and read."""
    texts = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], start=1):  # behind the last line end is half a line
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        is_whole = isinstance(line, dict) and isinstance(line.get("kind"), str)
        if not is_whole or type(line.get("step")) is not int:
            raise UserError(
                f"{path}, line {number} is damaged: {text[:80]!r} is not an object with a step and"
                " a kind. Remove that line to go on."
            )
        lines.append((text, line))
    return lines


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are one number; the other writers draw curves and nothing else."""
    result = {}
    for name, value in values.items():
        if not isinstance(value, str | Mapping | None) and np.ndim(value) == 0:
            result[name] = float(value)
    return result


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("TensorBoard", "tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, project: str, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("Weights & Biases", "wandb") from error
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=_lasting_id(folder / "wandb_id.txt"),
            resume="allow",
            dir=folder,
            config=dict(config or {}),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_scalars(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(what: str, extra: str) -> UserError:
    return UserError(
        f"Logging to {what} needs the extra {extra!r}."
        f' Install it with: pip install "jaxrec[{extra}]"'
    )


def _lasting_id(file: Path) -> str:
    """An id of its own for this folder, the same after a resume."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(6) + "\n")
    return file.read_text().strip()
