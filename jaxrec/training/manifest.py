"""What a checkpoint says about itself: which arrays it holds, with their fingerprints, under a
checksum.

A state is sorted into three items, each a flat dictionary from the path of an array
("blocks/up/kernel") to the array: `params`, `ema` (when there is a running average) and `rest`
(optimizer state, counters). Stored that way, a checkpoint does not depend on the classes that
optimizers use for their state.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxrec.training.fingerprint import fingerprint

Tree = Any
Named = dict[str, Any]  # path to array or abstract array
Description = dict[str, list[Any]]  # path to [dtype, shape, fingerprint]

LAYOUT = 1
"""Version of the layout on disk; a checkpoint of another version is refused, not guessed at."""


def split(state: Tree) -> dict[str, Named]:
    """Returns the items of a training state, a dictionary with at least "params"; empty items are
    left out.
    """
    rest = {key: value for key, value in state.items() if key not in ("params", "ema")}
    items = {"params": named(state["params"]), "ema": named(state.get("ema")), "rest": named(rest)}
    return {item: leaves for item, leaves in items.items() if leaves}


def join(items: dict[str, Named], like: Tree) -> Tree:
    """Returns the state that `split` took apart, in the structure of `like`."""
    state = dict(like)
    for item in ("params", "ema"):
        if item in items:
            state[item] = unnamed(items[item], like[item])
    rest = {key: value for key, value in like.items() if key not in ("params", "ema")}
    return state | unnamed(items.get("rest", {}), rest)


def named(tree: Tree) -> Named:
    """Returns the leaves of a tree by their path, without those of size 0: they hold nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves if leaf.size}


def unnamed(leaves: Named, like: Tree) -> Tree:
    """Returns the tree that `named` took apart, in the structure of `like`."""

    def find(path: Any, leaf: Any) -> Any:
        return leaves[_name(path)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(find, like)


def describe(items: dict[str, Named]) -> dict[str, Description]:
    """Returns dtype, shape and fingerprint of every array of every item, as JSON values.

    One fingerprint is awaited before the next is begun: each is a program with a collective, and
    several at once can deadlock on virtual devices (`sharding.is_virtual`).
    """
    return {
        item: {
            name: [str(leaf.dtype), list(leaf.shape), int(fingerprint(leaf))]
            for name, leaf in leaves.items()
        }
        for item, leaves in items.items()
    }


def mismatch(item: str, saved: Description, wanted: Named) -> str | None:
    """Returns how the arrays of a checkpoint differ from those wanted, in name, dtype or shape;
    None if they agree.
    """
    for name in sorted(saved.keys() | wanted.keys()):
        there = "{} {}".format(*saved[name]) if name in saved else "absent"
        here = f"{wanted[name].dtype} {list(wanted[name].shape)}" if name in wanted else "absent"
        if there != here:
            return f"{item}/{name} is {there} there and {here} here"
    return None


def seal(note: dict[str, Any]) -> dict[str, Any]:
    """Returns the note with its checksum; every layout version has one, so that damage is told from
    age.
    """
    return note | {"checksum": _checksum(json.loads(json.dumps(note)))}


def is_sealed(note: Any) -> bool:
    """Whether a note is as `seal` returned it."""
    if not isinstance(note, dict) or "checksum" not in note:
        return False
    return note["checksum"] == _checksum({k: v for k, v in note.items() if k != "checksum"})


def _checksum(note: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
