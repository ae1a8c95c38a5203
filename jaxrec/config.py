"""Frozen dataclasses to plain dictionaries and back, JSON files, and objects named by import path.

A configuration is a frozen dataclass whose fields are numbers, strings, booleans, None, tuples or
other such dataclasses. `from_dict(cls, to_dict(config)) == config` for every one of them.
"""

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxrec.errors import UserError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass as a dictionary that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Builds a dataclass from a dictionary; unknown and missing fields are errors that name them.

    Args:
      cls: the dataclass to build; nested dataclass fields are built the same way.
      data: field name to value, as `to_dict` or a JSON or YAML file gives it.
      where: prefix of the field names in messages, such as "optimizer.".

    Raises:
      UserError: a field is unknown, missing, of the wrong type, or refused by the dataclass itself.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where or cls.__name__}: expected a mapping of fields, got {data!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise UserError(
                f"{cls.__name__} has no field {where}{name}.{nearest(str(name), fields)}"
                f" The fields are: {', '.join(fields)}."
            )
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in data and not has_default:
            raise UserError(f"{cls.__name__} needs a value for the field {where}{name}.")
    values = {name: _coerce(hints[name], value, where + name) for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it cannot be read, or is not JSON, or nested beyond all sense.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise UserError(f"Cannot read {file}: it is not JSON ({error}).") from error


def beside(folder: Path, name: Any) -> Path:
    """The file of that name in a folder, for names that were read from a file.

    A link may lead elsewhere in the folder, or to the blobs of a Hugging Face cache, in whose
    snapshots every file is a link.

    Raises:
      UserError: the name is no plain name of a file, or the file lies elsewhere.
    """
    if not isinstance(name, str) or not name.strip(".") or set(name) & set("/\\\0"):
        raise UserError(f"{folder} names {name!r}; files must lie in that folder itself.")
    file, home = folder / name, folder.resolve()
    places = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(file.resolve().is_relative_to(place) for place in places):
        raise UserError(f"{file} is a link that leaves {folder}; put the file itself there.")
    return file


def at_least(config: Any, least: float, *fields: str) -> None:
    """Checks fields of a dataclass.

    Raises:
      ValueError: one of them is smaller; the message names it.
    """
    for field in fields:
        if not getattr(config, field) >= least:  # also refuses NaN
            raise ValueError(
                f"{type(config).__name__}: {field} must be >= {least}, got"
                f" {getattr(config, field)}."
            )


def above(config: Any, bound: float, *fields: str) -> None:
    """Checks fields of a dataclass that are not None.

    Raises:
      ValueError: one of them is not larger; the message names it.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value > bound:  # also refuses NaN
            raise ValueError(f"{type(config).__name__}: {field} must be > {bound}, got {value}.")


def multiple_of(config: Any, divisor: str, *fields: str) -> None:
    """Checks that fields of a dataclass are multiples of another field, which must be >= 1.

    Raises:
      ValueError: one of them is not; the message names it.
    """
    at_least(config, 1, divisor)
    for field in fields:
        value, by = getattr(config, field), getattr(config, divisor)
        if value < 1 or value % by:
            raise ValueError(
                f"{type(config).__name__}: {field} must be a multiple of {divisor}, got {value}"
                f" and {by}."
            )


def one_of(config: Any, field: str, known: Sequence[str]) -> None:
    """Checks a field of a dataclass that holds a name.

    Raises:
      ValueError: it is not a known one; the message names all.
    """
    name = getattr(config, field)
    if name not in known:
        raise ValueError(
            f"{type(config).__name__}: {field} must be one of {', '.join(known)}, got {name!r}."
        )


def load_object(path: str) -> Any:
    """Imports `package.module:NAME`, such as `jaxrec.models.huginn:TINY`.

    Raises:
      UserError: the path has another form, or the module or the name does not exist; the message
        then names the nearest.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(
            f"{path!r} is not of the form package.module:NAME, e.g. jaxrec.models.huginn:TINY."
        )
    try:
        module = importlib.import_module(module_name)
    except (TypeError, ValueError) as error:  # a relative or an empty name
        raise UserError(f"{module_name!r} is not the full name of a module.") from error
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise  # the module exists; something that it imports is missing
        hint = nearest(module_name, _siblings(module_name))
        raise UserError(
            f"There is no module {module_name}.{hint} `jaxrec list` shows all."
        ) from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if known.isupper()]
        known = ", ".join(public) or "none"
        raise UserError(f"{module_name} has no {name}.{nearest(name, public)} It has: {known}.")
    return getattr(module, name)


def _siblings(module_name: str) -> list[str]:
    """Names of the modules that lie beside a module that does not exist."""
    package_name, _, _ = module_name.rpartition(".")
    try:
        package = importlib.import_module(package_name)
    except (ImportError, ValueError):
        return []
    folders = [Path(folder) for folder in getattr(package, "__path__", [])]
    return [
        f"{package_name}.{file.stem}" for folder in folders for file in folder.glob("[a-z]*.py")
    ]


def _alike(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    """The one of several dataclasses that has the fields of a dictionary."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    given = set(value) if isinstance(value, dict) else set()
    found = [kind for kind in kinds if names[kind] == given]
    found = found or [kind for kind in kinds if given and given <= names[kind]]
    if len(found) != 1:
        known = "; ".join(f"{kind.__name__} ({', '.join(sorted(names[kind]))})" for kind in kinds)
        raise UserError(f"{name} must have the fields of one of {known}; got {value!r}.")
    return found[0]


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Fits a plain value to a field's type: a list to a tuple, a dictionary to a dataclass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = tuple(option for option in options if option is not type(None))
        return _coerce(
            options[0] if len(options) == 1 else _alike(options, value, name), value, name
        )
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            hint_text = nearest(str(value), map(str, options))
            raise UserError(
                f"{name} must be one of {', '.join(map(str, options))}; got {value!r}.{hint_text}"
            )
        return value
    if origin is tuple:
        hints = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list; got {value!r}.")
        if hints[1:] == (...,):
            hints = hints[:1] * len(value)
        if len(hints) != len(value):
            raise UserError(f"{name} must have {len(hints)} entries; got {value!r}.")
        return tuple(_coerce(*pair, name) for pair in zip(hints, value, strict=True))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=f"{name}.")  # type: ignore[arg-type]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    is_wrong = isinstance(hint, type) and not isinstance(value, hint)
    if is_wrong or (hint is int and isinstance(value, bool)):  # Python: True is an int
        raise UserError(f"{name} must be of type {getattr(hint, '__name__', hint)}; got {value!r}.")
    return value
