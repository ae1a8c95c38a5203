"""Several processes that make one run: how they start, agree, and stop together.

Each process holds some of the devices of one mesh and feeds them their own rows. Process 0 alone
locks the run folder and writes metrics, samples and run.json; all of them write the checkpoints,
which therefore must lie where every process sees them.
"""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrec.errors import UserError

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Host and port of process 0, how many processes there are, and which of them this is."""


def are_announced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that this is one of several processes: `VARIABLES`, or a step of
    SLURM (`srun`) with more than one task.
    """
    if VARIABLES[0] in environment:
        return True
    return "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, by `VARIABLES` or by what jax finds (SLURM, Open MPI, Cloud TPU,
    GKE); before anything touches a device.

    Raises:
      UserError: some of the variables are missing or wrong, nothing was found, or the others did
        not come.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    options: dict[str, Any] = {}
    if VARIABLES[0] in given:
        options["coordinator_address"] = given[VARIABLES[0]]
        for name, argument in zip(VARIABLES[1:], ("num_processes", "process_id"), strict=True):
            if name in given:
                options[argument] = _natural(name, given[name])
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"Could not join the other processes ({reason}). Set {', '.join(VARIABLES)} for each,"
            f" or start them by srun, mpirun or on a TPU slice; there is {found}. See"
            " docs/operations.md."
        ) from error


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def first_does(action: Callable[[], T]) -> T | None:
    """Runs an action on process 0 while the others wait; what it refuses, all refuse.

    Returns:
      What the action returned, None on the other processes.

    Raises:
      UserError: the action did.
    """
    if not several():
        return action()
    result, refusal = None, ""
    if is_first():
        try:
            result = action()
        except UserError as error:
            refusal = str(error)
    said = _broadcast(refusal)
    if said:
        raise UserError(said)
    return result


def any_true(here: bool) -> bool:
    """Whether it is true on any process."""
    if not several():
        return here
    return bool(np.any(multihost_utils.process_allgather(np.asarray([here]))))


def check_same(what: str, value: Any) -> None:
    """Checks that all processes were given the same, a JSON value.

    Raises:
      UserError: they were not; the same error on all of them.
    """
    if not several():
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    mine = np.frombuffer(digest, np.uint8)
    all_of_them = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, mine.size)
    others = np.flatnonzero(np.any(all_of_them != all_of_them[0], axis=1))
    if others.size:
        raise UserError(
            f"Process {others[0]} of {jax.process_count()} has {what} other than process 0's. Start"
            " all of them by the same command, on the same files."
        )


@contextmanager
def stop_signals() -> Iterator[None]:
    """Lets jax notice SIGTERM, and SIGINT as well; see `stop_at`."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_at(step: int) -> bool:
    """Whether all processes stop after this step because one of them was told to.

    Every process asks after every step; jax's coordination service finds a step that none has
    passed.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def _broadcast(text: str) -> str:
    """Process 0's text."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(data.size, np.int32)))
    mine = data if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine))).decode() if size else ""


def _natural(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name} must be a number from 0; got {value!r}.")
    return int(value)
