"""Sequences to be turned into others by a rule that holds at every length, and chains of facts.

Tokens of `transduction`: 0 pads, then BEGIN, END and PLUS; digit i is SPECIAL + i.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.synthetic import Task

BEGIN, END, PLUS, SPECIAL = 1, 2, 3, 4

Rule = Literal["copy", "reverse", "addition"]


class Transduction(NamedTuple):
    """Sources, and what is to be written; int64."""

    source: np.ndarray  # (b s)
    source_is_token: np.ndarray  # bool (b s)
    inputs: np.ndarray  # (b t): BEGIN and the target
    labels: np.ndarray  # (b t): the target and END; IGNORED behind

    def batch(self) -> dict[str, np.ndarray]:
        """What `tasks.train_task` takes of a model with an encoder, int32."""
        fields = self._asdict().items()
        return {name: x if x.dtype == bool else x.astype(np.int32) for name, x in fields}


def transduction(
    rule: Rule,
    examples: int,
    lengths: tuple[int, int],
    *,
    base: int = 10,
    room: int | None = None,
    seed: int,
) -> Transduction:
    """Random digits with their copy, their reverse, or the sum of two numbers.

    Numbers are written from their lowest digit on, as a PLUS b, both of one length; their sum has
    one digit more.

    Args:
      rule: what is to be written.
      examples: number of sequences b.
      lengths: least and largest number of digits (of each number, where two are added); every one
        in between is as likely.
      base: digits are 0 .. base-1; the vocabulary is base + SPECIAL.
      room: number of digits that padded sequences have room for; None: the largest.
      seed: of NumPy's `default_rng`.

    Returns:
      Sources and targets of the lengths that `room` digits need.

    Raises:
      ValueError: the rule is unknown, or the lengths are out of order.

    Kaiser & Sutskever, Neural GPUs learn algorithms (2015), arXiv:1511.08228; Dehghani et al.
    (2018), arXiv:1807.03819, section 3.3.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"transduction: rule must be one of {get_args(Rule)}, got {rule!r}.")
    room = lengths[1] if room is None else room
    if not 1 <= lengths[0] <= lengths[1] <= room or base < 2:
        raise ValueError(
            "transduction: needs 1 <= least <= largest length <= room and base >= 2, got lengths"
            f" {lengths}, room {room} and base {base}."
        )
    random = np.random.default_rng(seed)
    length = random.integers(lengths[0], lengths[1] + 1, (examples, 1))
    digits = random.integers(0, base, (2, examples, room))
    place = np.arange(room)
    digits[:, place >= length] = 0
    first, second = digits + SPECIAL
    if rule == "addition":
        at = np.arange(2 * room + 1)
        behind = np.clip(at - length - 1, 0, room - 1)
        source = np.where(at < length, np.take(first, np.minimum(at, room - 1), axis=1), PLUS)
        source = np.where(at > length, np.take_along_axis(second, behind, axis=1), source)
        source_length, target_length = 2 * length + 1, length + 1
        target = added(digits[0], digits[1], base) + SPECIAL
    else:
        source, source_length, target_length = first, length, length
        back = np.clip(length - 1 - place, 0, room - 1)
        target = first if rule == "copy" else np.take_along_axis(first, back, axis=1)
    source_is_token = np.arange(source.shape[1]) < source_length
    at = np.arange(target.shape[1] + 1)
    wide = np.pad(target, [(0, 0), (0, 1)])
    labels = np.where(at < target_length, wide, np.where(at == target_length, END, IGNORED))
    inputs = np.concatenate([np.full((examples, 1), BEGIN), target], axis=1)
    return Transduction(
        np.where(source_is_token, source, 0),
        source_is_token,
        np.where(at <= target_length, inputs, 0),
        labels,
    )


def added(first: np.ndarray, second: np.ndarray, base: int) -> np.ndarray:
    """Digits (b n + 1) of the sums of numbers (b n), lowest first."""
    carry, columns = np.zeros(len(first), np.int64), []
    for column in (first + second).T:
        carry, digit = np.divmod(column + carry, base)
        columns.append(digit)
    return np.stack([*columns, carry], axis=1)


def chains(examples: int, *, entities: int, hops: tuple[int, int], seed: int) -> Task:
    """Facts x -> y, and where so many of them lead from an entity: the supporting facts of a
    question.

    A permutation of the entities is given as one token for each of its facts, in random order;
    then a token for the number of hops, and the entity to begin from, where the label is the entity
    at the end. Facts are x entities + y; then come the entities, and then the numbers of hops.

    Args:
      examples: number of sequences b.
      entities: how many, n >= 2; the vocabulary is n^2 + n + the largest number of hops + 1.
      hops: least and largest number of hops; every one in between is as likely.
      seed: of NumPy's `default_rng`.

    Returns:
      Sequences of length n + 2. The number of hops is inputs[:, -2] - n^2 - n.

    Raises:
      ValueError: there are too few entities, or the hops are out of order.

    After Weston et al., Towards AI-complete question answering (2015), arXiv:1502.05698.
    """
    if entities < 2 or not 1 <= hops[0] <= hops[1]:
        raise ValueError(
            f"chains: needs entities >= 2 and 1 <= least <= most hops, got {entities} and {hops}."
        )
    random = np.random.default_rng(seed)
    leads_to = np.argsort(random.random((examples, entities)), axis=1)
    facts = np.arange(entities) * entities + leads_to
    facts = random.permuted(facts, axis=1)
    count = random.integers(hops[0], hops[1] + 1, examples)
    begin = at = random.integers(0, entities, examples)
    for hop in range(hops[1]):
        at = np.where(hop < count, leads_to[np.arange(examples), at], at)
    asked = np.stack([entities**2 + entities + count, entities**2 + begin], axis=1)
    inputs = np.concatenate([facts, asked], axis=1)
    labels = np.full_like(inputs, IGNORED)
    labels[:, -1] = entities**2 + at
    return Task(inputs, labels)
