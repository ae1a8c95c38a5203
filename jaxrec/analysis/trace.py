"""Which operations of a compiled program take the time: from the events of a profiler's trace.

The profiler of JAX notes for every operation that ran how it is called in the compiled program.
The program's text knows what it is and in which named scope of the source it was made.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from jaxrec.errors import UserError

CONTROL = {"while", "call", "conditional", "async-start", "async-done", "async-update"}
"""Operations that run others, whose time is counted where it is spent."""
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s.*?\s([a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WRAPPED = re.compile(r"^(?:jit|pjit|jvp|transpose|vmap|remat|custom_jvp|custom_vjp)\((.*)\)$")
# What JAX adds to a name on its own.
_MACHINERY = {
    *("while", "body", "cond", "checkpoint", "rematted_computation", "closed_call", "remat"),
    *("custom_jvp_call", "custom_vjp_call", "shard_map", "branch_0_fun", "branch_1_fun", "main"),
}


class Event(NamedTuple):
    """One operation that ran."""

    operation: str  # its name in the compiled program
    module: str  # the program's
    nanoseconds: float


class Operation(NamedTuple):
    """What a compiled program says of an operation."""

    kind: str  # "fusion", "dot", ...
    scope: str  # named scopes of the source, "" if there are none; ends in "'" in a gradient


class Row(NamedTuple):
    """All events of one operation."""

    operation: str
    kind: str
    scope: str
    runs: int
    nanoseconds: float
    share: float  # of the time of all operations


def read_events(folder: Path) -> list[Event]:
    """The operations of the newest trace below a folder, as `jax.profiler.trace` has written it.

    Raises:
      UserError: there is no trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{folder} holds no trace (*.xplane.pb).")
    return list(_events(jax.profiler.ProfileData.from_file(str(files[-1]))))


def _events(data: jax.profiler.ProfileData) -> Iterator[Event]:
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and event.duration_ns > 0:
                    module = str(stats.get("hlo_module", ""))
                    yield Event(str(stats["hlo_op"]), module, float(event.duration_ns))


def operations(text: str) -> dict[str, Operation]:
    """The operations of a compiled program by name, from its text (`Compiled.as_text`)."""
    found = {}
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is not None:
            name = _OP_NAME.search(line)
            found[match[1]] = Operation(match[2], scope_of(name[1]) if name else "")
    return found


def scope_of(op_name: str) -> str:
    """The named scopes in an operation's name, such as "core/attention"; with "'" behind it in a
    gradient.

    >>> scope_of("jit(train)/transpose(jvp(core))/while/body/attention/dot_general")
    "core/attention'"
    """
    scopes: list[str] = []
    for part in op_name.split("/")[:-1]:
        is_jit = part.startswith(("jit(", "pjit("))
        while match := _WRAPPED.match(part):
            part = match[1]
        if part and not is_jit and part not in _MACHINERY and part not in scopes[-1:]:
            scopes.append(part)
    return "/".join(scopes) + ("'" if "transpose(" in op_name and scopes else "")


def by_scope(rows: Iterable[Row]) -> dict[str, float]:
    """The share of each scope in the time, the largest first."""
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        shares[row.scope] += row.share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def table(events: Iterable[Event], known: Mapping[str, Operation], module: str) -> list[Row]:
    """The operations of one program by the time they took, the longest first.

    Args:
      events: of a trace.
      known: what the program says of them.
      module: its name; events of other programs are left out.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        operation = known.get(event.operation)
        if event.module == module and (operation is None or operation.kind not in CONTROL):
            times[event.operation].append(event.nanoseconds)
    total = sum(map(sum, times.values()))
    rows = [
        Row(name, *known.get(name, Operation("", "")), len(each), sum(each), sum(each) / total)
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row.nanoseconds)
