"""Reading the config.json of a published checkpoint, none of whose fields is ignored unsaid."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from jaxrec.config import from_dict
from jaxrec.errors import UserError, nearest

T = TypeVar("T")

BOOKKEEPING = (
    "architectures auto_map dtype torch_dtype transformers_version use_cache bos_token_id"
    " eos_token_id pad_token_id output_hidden_states output_attentions return_dict"
    " chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type"
).split()
"""Fields that any file of the Hugging Face layout may have, and that say nothing of the equations.
"""

MOST = 10_000
"""Layers, or states of a layer with a dense matrix: far beyond all models. A number in a damaged
file could fill the memory.
"""


def check_names(
    system: str, data: Mapping[str, Any], known: Collection[str], required: Collection[str]
) -> None:
    """Refuses fields that are not known and the lack of required ones.

    Args:
      system: named in messages.
      data: the file.
      known: names that may occur beside `required` and `BOOKKEEPING`; so may any that begin with
        an underscore.
      required: names that must occur.

    Raises:
      UserError: a name is unknown or missing.
    """
    names = [*required, *known, *BOOKKEEPING]
    for name in data:
        if name not in names and not name.startswith("_"):
            raise UserError(f"{system}: unknown field {name} in config.json.{nearest(name, names)}")
    for name in required:
        if name not in data:
            raise UserError(f"{system}: config.json lacks the field {name}.")


def check_values(system: str, data: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses other values than the wanted ones in fields that occur.

    Raises:
      UserError: a field has another value.
    """
    for name, want in wanted.items():
        if data.get(name, want) != want:
            raise UserError(f"{system}: {name} must be {want!r}, got {data[name]!r}.")


def check_counts(system: str, data: Mapping[str, Any], *names: str) -> None:
    """Refuses what is not a positive integer.

    Raises:
      UserError: a field is not.
    """
    for name in names:
        if not isinstance(data[name], int) or data[name] < 1:
            raise UserError(f"{system}: {name} must be a count, got {data[name]!r}.")


def check_most(system: str, data: Mapping[str, Any], name: str) -> None:
    """Refuses more than any model has, where tables or matrices grow with it.

    Raises:
      UserError: the field is no count, or above MOST.
    """
    check_counts(system, data, name)
    if data[name] > MOST:
        raise UserError(f"{system}: {name} must be at most {MOST}, got {data[name]}.")


def build(system: str, cls: type[T], fields: Mapping[str, Any]) -> T:
    """The configuration of our own fields.

    Raises:
      UserError: one has the wrong type, or the configuration refuses it.
    """
    try:
        return from_dict(cls, dict(fields))
    except UserError as error:
        raise UserError(f"{system}: config.json: {error}") from error
