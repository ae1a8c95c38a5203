"""Checkpoints of a training run: saved in the background by Orbax, verified when they are read.

    <directory>/<step>/{params,ema,rest}  the arrays, see `jaxrec.training.manifest`
    <directory>/<step>/meta               layout version, what the caller noted, and dtype, shape
                                          and fingerprint of every array

Restoring gives back the saved bits, on any mesh, or one line that names the folder and what to do.
A run that goes on takes the newest checkpoint that is whole; what is damaged it moves beside the
others, to <directory>-damaged, and never deletes.
"""

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxrec.errors import UserError
from jaxrec.training import hosts, manifest
from jaxrec.training.manifest import LAYOUT
from jaxrec.training.storage_errors import Damage, hushed, is_not_from_orbax, reason_of

Tree = Any
T = TypeVar("T")


class DamagedCheckpoint(UserError):
    """What was read is not what was saved."""


class Restored(NamedTuple):
    """What a run goes on with."""

    step: int
    state: Tree
    damaged: tuple[str, ...]  # a line for each newer checkpoint that could not be used


class Checkpoints:
    """The checkpoints of one run.

    One process, or one group of `jax.distributed`, writes into a directory; others open it with
    `read_only`. Use it as a context manager, or call `close`, so that the last save is finished and
    its errors are seen.

    Args:
      directory: holds one folder per step; made when missing.
      keep: number of checkpoints kept, the newest; None keeps all.
      read_only: changes nothing in the directory.
    """

    def __init__(
        self, directory: str | Path, *, keep: int | None = 3, read_only: bool = False
    ) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        self._pending: int | None = None  # the step that is being written
        logging.getLogger("absl").addFilter(is_not_from_orbax)
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Returns the steps that are completely written, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def latest_step(self) -> int | None:
        """Returns the newest step that is completely written, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Begins to save; returns once the arrays may be overwritten or donated.

        Args:
          step: number of updates made; larger than that of every checkpoint there is.
          state: a dictionary of pytrees of jax arrays with at least "params"; "ema" may be None.
          meta: what the caller wants to know when resuming; JSON values only.

        Raises:
          UserError: this or the previous save failed (disk full, say), or there is a checkpoint of
            this or a later
            step. What was there before is still there.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise UserError(
                f"Step {step} was not saved: {self.directory} already holds step {latest}."
                " Remove the later folders to save again, or choose another run name."
            )
        items = manifest.split(state)
        note = {"layout": LAYOUT, "step": step, "meta": meta, "leaves": manifest.describe(items)}
        args: dict[str, Any] = {item: ocp.args.StandardSave(items[item]) for item in items}
        args["meta"] = ocp.args.JsonSave(manifest.seal(note))

        def begin() -> None:
            if not self._manager.save(step, args=ocp.args.Composite(**args)):
                raise OSError("Orbax declined to save it")

        self._write(step, begin)
        self._pending = step

    def wait(self) -> None:
        """Waits for the save that is under way, if any.

        Raises:
          UserError: it failed. What was there before is still there.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None

        def finish() -> None:
            self._manager.wait_until_finished()
            if step not in self.steps():  # Orbax only logs some failures of its background thread
                raise OSError("the finished folder did not appear")

        self._write(step, finish)

    def close(self) -> None:
        """Waits as `wait` does, then ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what the caller noted when saving this step.

        Raises:
          UserError: the checkpoint is missing, damaged, or of another layout version.
        """
        return self._note(step)["meta"]

    def restore(self, step: int, abstract: Tree) -> Tree:
        """Returns the state that was saved, bit for bit.

        Args:
          step: which checkpoint.
          abstract: the state as `jax.ShapeDtypeStruct`s with the shardings wanted now; the mesh may
            be another than the one it was saved on.

        Raises:
          UserError: the checkpoint is missing or damaged (names the array), or belongs to another
            model, optimizer or layout version.
        """
        note, wanted = self._note(step), manifest.split(abstract)
        for item in sorted(note["leaves"].keys() | wanted.keys()):
            self._compare(step, item, note["leaves"].get(item, {}), wanted.get(item, {}))
        return manifest.join(self._load(step, wanted, note), abstract)

    def restore_newest(self, abstract: Tree) -> Restored | None:
        """Returns the newest state that is whole, None if nothing was ever saved.

        The damaged ones that are newer leave the directory, so that their steps can be saved again;
        when none is whole, all stay where they are.

        Args:
          abstract: as of `restore`.

        Raises:
          DamagedCheckpoint: every checkpoint is damaged; what is said is of the newest.
          UserError: as of `restore`, for any other reason.
        """
        failures: list[tuple[int, DamagedCheckpoint]] = []
        for step in reversed(self.steps()):
            state, failure = None, None
            try:
                state = self.restore(step, abstract)
            except DamagedCheckpoint as error:
                failure = error
            if hosts.any_true(failure is not None):
                folder = self._folder(step)
                elsewhere = DamagedCheckpoint(
                    f"Checkpoint {folder} is damaged: another host says so."
                )
                failures.append((step, failure or elsewhere))
                continue
            moved = tuple(self._move_away(bad, error, step) for bad, error in failures)
            return Restored(step, state, moved)
        if failures:
            raise failures[0][1]
        return None

    def restore_params(self, step: int, abstract: Tree, *, average: bool = False) -> Tree:
        """Returns the parameters only, without reading the optimizer state.

        Args:
          step: which checkpoint.
          abstract: the parameters as `jax.ShapeDtypeStruct`s with the shardings wanted now.
          average: the running average instead.

        Raises:
          UserError: as `restore`, or the run kept no running average.
        """
        note, item = self._note(step), "ema" if average else "params"
        if item not in note["leaves"]:
            raise UserError(
                f"Checkpoint {self._folder(step)} has no running average. Use its parameters,"
                " or train with optimizer.ema_decay."
            )
        wanted = manifest.named(abstract)
        self._compare(step, item, note["leaves"][item], wanted)
        return manifest.unnamed(self._load(step, {item: wanted}, note)[item], abstract)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self._read_only else self._keep,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            create=not self._read_only,
            cleanup_tmp_directories=not self._read_only,  # left by a run that died while saving
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(
                f"Cannot keep checkpoints in {self.directory} ({reason_of(error)})."
                " Choose another place."
            ) from error

    def _move_away(self, step: int, error: DamagedCheckpoint, good: int) -> str:
        """Takes a damaged checkpoint out of the directory; returns a line about it."""
        place = self.directory.with_name(self.directory.name + "-damaged")

        def move() -> Path:
            place.mkdir(exist_ok=True)
            names = (str(step), *(f"{step}-{again}" for again in range(2, 1000)))
            target = next(place / name for name in names if not (place / name).exists())
            os.replace(self._folder(step), target)
            return target

        target = hosts.first_does(move) or place
        self._manager.reload()
        reason = str(error).partition(" Remove that folder")[0]
        return f"{reason} Going on from step {good}; the damaged folder is now {target}."

    def _write(self, step: int, action: Callable[[], None]) -> None:
        """Runs an action; if it fails, leaves a manager that can save again and says so."""
        try:
            return action()
        except Exception as error:
            cause, reason = error, reason_of(error)
        with contextlib.suppress(Exception):  # the same failure once more
            self._manager.close()
        self._manager = self._open()  # and removes what was half written
        latest = self.latest_step()
        good = "there is no checkpoint yet"
        if latest is not None:
            good = f"the last good checkpoint is step {latest}"
        raise UserError(
            f"Could not save step {step} to {self.directory} ({reason}); {good}."
            " Make room or choose another place, then resume."
        ) from cause

    def _read(self, step: int, action: Callable[[], T]) -> T:
        """Runs an action; whatever a damaged file makes Orbax raise becomes one line of ours."""
        with hushed():
            try:
                return action()
            except jax.errors.JaxRuntimeError:
                raise  # the device, not the file: out of memory, say
            except Exception as error:
                reason = reason_of(error)
            gc.collect()  # reads that were never awaited end here ...
            time.sleep(0.2)  # ... and those under way in other threads
        older = [other for other in self.steps() if other < step]
        advice = "and start again: there is no older checkpoint"
        if older:
            advice = f"to go on from step {older[-1]}"
        raise DamagedCheckpoint(
            f"Checkpoint {self._folder(step)} is damaged: {reason}. Remove that folder {advice}."
        )

    def _note(self, step: int) -> dict[str, Any]:
        """Reads and verifies the meta item of a step."""
        steps = self.steps()
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}; its steps are: {have}."
            )

        def read() -> dict[str, Any]:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            note = self._manager.restore(step, args=args)["meta"]
            if not manifest.is_sealed(note):
                raise Damage("meta does not have its checksum")
            return note

        note = self._read(step, read)
        if note["layout"] != LAYOUT:
            raise UserError(
                f"Checkpoint {self._folder(step)} has layout version {note['layout']} and this"
                f" jaxrec reads version {LAYOUT}. Use the jaxrec that wrote it, or start again"
                " under another run name."
            )
        return note

    def _compare(
        self, step: int, item: str, saved: manifest.Description, wanted: manifest.Named
    ) -> None:
        difference = manifest.mismatch(item, saved, wanted)
        if difference:
            raise UserError(
                f"Checkpoint {self._folder(step)} belongs to another model or optimizer:"
                f" {difference}. Resume with the configuration it was saved with, or choose another"
                " run name."
            )

    def _load(
        self, step: int, wanted: dict[str, manifest.Named], note: dict[str, Any]
    ) -> dict[str, manifest.Named]:
        """Reads arrays onto the devices and compares their fingerprints."""

        def read() -> dict[str, manifest.Named]:
            args = {item: ocp.args.StandardRestore(wanted[item]) for item in wanted}
            composite = self._manager.restore(step, args=ocp.args.Composite(**args))
            restored = {item: composite[item] for item in wanted}
            for item, leaves in manifest.describe(restored).items():
                for name, found in leaves.items():
                    if found != note["leaves"][item][name]:
                        raise Damage(f"{item}/{name} is not as it was saved")
            return restored

        return self._read(step, read)
