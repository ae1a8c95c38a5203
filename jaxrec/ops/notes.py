"""Numbers from the inside of a function, taken out of it without a part in its result.

Where there is something to watch, code says `note("decay", a)`. That does nothing, and
leaves nothing in a compiled program, unless the call is made by `collect` and asks for that name:
then the value is reduced on the spot and comes out beside the result, through all loops that
`through` has prepared.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Reducer = Callable[[Any], dict[str, Array]]
Found = dict[str, list[dict[str, Array]]]


class _Page:
    """What one level of loops has noted. Every array has a leading axis: one entry per note."""

    def __init__(self, reducers: Mapping[str, Reducer]):
        self.reducers = reducers
        self.found: Found = {}

    def add(self, name: str, entry: dict[str, Array]) -> None:
        self.found.setdefault(name, []).append(entry)


_page: ContextVar[_Page | None] = ContextVar("page", default=None)


def note(name: str, value: Any) -> None:
    """Hands a value to a `collect` that asks for this name.

    Args:
      name: what it is.
      value: arrays, or a function that makes them, which is not called when nobody asks.
    """
    page = _page.get()
    if page is not None and name in page.reducers:
        entry = page.reducers[name](value() if callable(value) else value)
        page.add(name, {key: jnp.asarray(x)[None] for key, x in entry.items()})


def is_collecting() -> bool:
    """Whether somebody asks for notes."""
    return _page.get() is not None


def collect(
    function: Callable[..., Any], reducers: Mapping[str, Reducer]
) -> Callable[..., tuple[Any, dict[str, dict[str, Array]]]]:
    """The function, with what it notes.

    Args:
      function: any; traced anew at every call.
      reducers: name of a note -> (value) -> arrays by name, the same shapes for all its notes.

    Returns:
      (arguments) -> its result, and for every name that was noted the reduced arrays, each with a
      leading axis: the notes in the order in which they were made.
    """

    def run(*args: Any, **options: Any) -> tuple[Any, dict[str, dict[str, Array]]]:
        result, found = _apart(function, _Page(reducers))(*args, **options)
        joined = {
            name: jax.tree.map(lambda *each: jnp.concatenate(each), *entries)
            for name, entries in found.items()
        }
        return result, joined

    return run


def through(
    body: Callable[[Any, Any], tuple[Any, Any]],
) -> tuple[Callable[[Any, Any], tuple[Any, Any]], Callable[[Any], Any]]:
    """A body of `lax.scan` that hands on its notes, if anybody asks for them.

    Returns:
      The body to be scanned, and what takes the notes out of its stacked ys and gives the rest.
    """
    page = _page.get()
    if page is None:
        return body, lambda ys: ys

    def noting(carry: Any, x: Any) -> tuple[Any, tuple[Any, Found]]:
        (carry, y), found = _apart(body, page)(carry, x)
        return carry, (y, found)

    def settle(ys: tuple[Any, Found]) -> Any:
        rest, found = ys
        for name, entries in found.items():
            for entry in entries:  # of shape (steps of the loop, notes of each, ...)
                page.add(name, {key: x.reshape(-1, *x.shape[2:]) for key, x in entry.items()})
        return rest

    return noting, settle


def around(
    transform: Callable[[Callable[..., Any]], Callable[..., Any]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`transform(function)`, handing on what the function notes: for `jax.checkpoint` and others
    that let only results out.
    """
    page = _page.get()
    if page is None:
        return transform(function)
    transformed = transform(_apart(function, page))

    def run(*args: Any, **options: Any) -> Any:
        result, found = transformed(*args, **options)
        for name, entries in found.items():
            for entry in entries:
                page.add(name, entry)
        return result

    return run


def _apart(function: Callable[..., Any], page: _Page) -> Callable[..., tuple[Any, Found]]:
    """The function with its notes, as the page reduces them, beside its result."""

    def run(*args: Any, **options: Any) -> tuple[Any, Found]:
        inside = _Page(page.reducers)
        with _on(inside):
            result = function(*args, **options)
        return result, inside.found

    return run


def silently(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without its notes: for loops of unknown length, which have no room for them."""
    if not is_collecting():
        return function

    def run(*args: Any, **options: Any) -> Any:
        with _on(None):
            return function(*args, **options)

    return run


@contextmanager
def _on(page: _Page | None) -> Iterator[None]:
    token = _page.set(page)
    try:
        yield
    finally:
        _page.reset(token)
