"""What a compiled program sends between devices, by axis of the mesh.

Bytes are those that each device sends in the ring form of an exchange among g devices, for an array
of s bytes per device before it is exchanged:

    all-gather (g - 1) s;  reduce-scatter s (g - 1) / g;  all-reduce 2 s (g - 1) / g;
    all-to-all s (g - 1) / g;  collective-permute s
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
"""Of the types whose name does not end in their size."""

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^}]*)\}"
)
_EVERYONE = re.compile(r"replica_groups=\{\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})?\}")


class Exchange(NamedTuple):
    """One collective operation of a program."""

    kind: str
    axes: tuple[str, ...]  # along which the devices that exchange differ
    bytes: float  # sent by each device, each time
    times: int  # that it runs in one run of the program
    shapes: tuple[tuple[int, ...], ...]  # of what each device then has


def exchanges(text: str, sizes: Mapping[str, int], *, loops: int = 1) -> list[Exchange]:
    """The collectives of a program.

    Args:
      text: of the compiled program, `compiled.as_text()`.
      sizes: axes of the mesh in their order, with their sizes; devices are numbered along them.
      loops: how often a loop runs whose length is not fixed in the program.

    Raises:
      ValueError: a group of devices is written in a notation that is not known.
    """
    bodies, entry = _computations(text)
    found: list[Exchange] = []

    def visit(name: str, times: int) -> None:
        for result, kind, rest in bodies.get(name, []):
            plain = kind.removesuffix("-start")
            if plain in KINDS:
                found.append(_exchange(plain, result, rest, sizes, times))
            inner = times
            if kind == "while":
                trips = _TRIPS.search(rest)
                inner = times * (int(trips[1]) if trips else loops)
            for called in _called(rest):
                visit(called, inner)

    visit(entry, 1)
    return found


def by_axis(found: list[Exchange]) -> dict[str, dict[str, float]]:
    """Bytes that each device sends in a run of the program, by axes (joined by "*") and kind."""
    table: dict[str, dict[str, float]] = {}
    for exchange in found:
        kinds = table.setdefault("*".join(exchange.axes), {})
        sent = exchange.bytes * exchange.times
        kinds[exchange.kind] = kinds.get(exchange.kind, 0.0) + sent
    return table


def times_by_axis(found: list[Exchange]) -> dict[str, dict[str, int]]:
    """How many exchanges there are in a run of the program, by axes and kind as `by_axis` has
    them.
    """
    table: dict[str, dict[str, int]] = {}
    for exchange in found:
        kinds = table.setdefault("*".join(exchange.axes), {})
        kinds[exchange.kind] = kinds.get(exchange.kind, 0) + exchange.times
    return table


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Instructions (result, kind, rest) by computation, and the name of the first one to run."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            bodies[name].append((instruction[1], instruction[2], instruction[3]))
    return bodies, entry


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _exchange(kind: str, result: str, rest: str, sizes: Mapping[str, int], times: int) -> Exchange:
    groups = _groups(rest, sizes)
    members = groups.shape[1]
    size = _bytes(result)
    if kind == "collective-permute":
        sent = size
    elif kind == "all-gather":
        sent = size * (members - 1) / members
    elif kind == "reduce-scatter":
        sent = size * (members - 1)
    elif kind == "all-reduce":
        sent = 2 * size * (members - 1) / members
    else:
        sent = size * (members - 1) / members
    shapes = tuple(tuple(_numbers(shape)) for _, shape in _SHAPE.findall(result))
    return Exchange(kind, _axes(groups, sizes), sent, times, shapes)


def _groups(rest: str, sizes: Mapping[str, int]) -> np.ndarray:
    """(groups members) of device numbers; pairs, of a permutation. XLA has four notations."""
    if iota := _IOTA.search(rest):
        shape, dims, order = map(_numbers, iota.groups())
        return _turned(dims, order).reshape(shape)
    if mesh := _MESH.search(rest):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        shape = [int(size) for size in axes.values()]
        among = re.findall(r"'([^']+)'(?=[,}]|$)", mesh[4])
        devices = _turned(_numbers(mesh[2]) or shape, _numbers(mesh[3])).reshape(shape)
        last = [list(axes).index(name) for name in among]
        devices = np.moveaxis(devices, last, range(-len(last), 0))
        return devices.reshape(-1, int(np.prod([shape[i] for i in last])))
    if (listed := _LISTED.search(rest)) and listed[1]:
        rows = re.findall(r"\{([\d,\s]+)\}", listed[0])
        return np.array([_numbers(row) for row in rows])
    if "replica_groups=" in rest and not _EVERYONE.search(rest):
        raise ValueError(f"collectives: groups in an unknown notation: {rest[:200]}")
    return np.arange(int(np.prod(list(sizes.values()))))[None]


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _turned(dims: list[int], order: list[int]) -> np.ndarray:
    devices = np.arange(int(np.prod(dims))).reshape(dims)
    return devices.transpose(order) if order else devices


def _axes(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(sizes.values())))
    differ = np.any(places != places[:, :, :1], axis=(1, 2))
    return tuple(name for name, yes in zip(sizes, differ, strict=True) if yes)


def _bytes(result: str) -> float:
    total = 0.0
    for kind, shape in _SHAPE.findall(result):
        bits = BITS.get(kind) or int(re.sub(r"\D*(\d+).*", r"\1", kind))
        total += bits / 8 * np.prod([int(n) for n in shape.split(",") if n])
    return total
