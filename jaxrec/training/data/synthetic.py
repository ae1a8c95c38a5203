"""Made tasks that ask what a sequence model remembers, and what it keeps track of."""

import itertools
from typing import NamedTuple

import numpy as np

from jaxrec.training.data.batches import IGNORED

BEGIN, BETWEEN, ASK, SPECIAL = 1, 2, 3, 4
"""Tokens of `set_disjointness` that frame its lists; ordinary ones begin at SPECIAL."""


class Task(NamedTuple):
    """Sequences, and the token that each position must predict, or IGNORED."""

    inputs: np.ndarray  # int64 (b t)
    labels: np.ndarray  # int64 (b t)

    def batch(self) -> dict[str, np.ndarray]:
        """What `tasks.train_task` takes, int32."""
        return {name: x.astype(np.int32) for name, x in self._asdict().items()}


def set_disjointness(examples: int, first: int, second: int, *, vocab: int, seed: int) -> Task:
    """Two lists that share one token, which is to be named: [1] A [2] B [3] -> the shared token.

    A model with a fixed state must keep the list that it reads first, whatever its length; which
    one is short decides how hard that is. A is drawn from one half of the ordinary tokens and B
    from the other, without repetition; then a random place of B takes a random token of A.

    Args:
      examples: number of sequences b.
      first: tokens of A.
      second: tokens of B.
      vocab: number of tokens, the four special ones included.
      seed: of NumPy's `RandomState`, whose stream never changes.

    Returns:
      Sequences of length t = first + second + 3, the only label at the last position.

    Raises:
      ValueError: half the vocabulary is smaller than a list.

    Arora et al. (2024), arXiv:2407.05483, section 3.
    """
    half = vocab // 2
    if not (1 <= first <= half and 1 <= second <= vocab - SPECIAL - half):
        raise ValueError(
            f"set_disjointness: lists of {first} and {second} tokens need 1 .. {half} and"
            f" 1 .. {vocab - SPECIAL - half} for a vocabulary of {vocab}."
        )
    random = np.random.RandomState(seed)
    inputs = np.empty((examples, first + second + 3), np.int64)
    labels = np.full_like(inputs, IGNORED)
    for row, label in zip(inputs, labels, strict=True):
        tokens = random.permutation(np.arange(SPECIAL, vocab))
        a = random.choice(tokens[:half], first, replace=False)
        b = random.choice(tokens[half:], second, replace=False)
        shared = a[random.randint(first)]
        b[random.randint(second)] = shared
        row[:] = [BEGIN, *a, BETWEEN, *b, ASK]
        label[-1] = shared
    return Task(inputs, labels)


def associative_recall(examples: int, pairs: int, time: int, *, vocab: int, seed: int) -> Task:
    """Multi-query associative recall: key-value pairs, and then the keys again among filler tokens,
    each to be followed by its value.

    Keys are distinct tokens of 1 .. vocab/2 - 1, values are tokens of vocab/2 .. vocab - 1, and 0
    fills. A query stands at a distance from its pair drawn by a power law, as repeated words do.

    Args:
      examples: number of sequences b.
      pairs: of a key and a value, at the beginning.
      time: length t >= 4 pairs.
      vocab: number of tokens.
      seed: of NumPy's `default_rng`.

    Returns:
      Sequences, and labels where a key is asked for, at the position of the key.

    Raises:
      ValueError: t is too short, or there are fewer keys than pairs.

    Arora et al., Zoology: measuring and improving recall in efficient language models (2023),
    arXiv:2312.04927.
    """
    if time < 4 * pairs or pairs > vocab // 2 - 1 or pairs < 1:
        raise ValueError(
            f"associative_recall: {pairs} pairs need t >= {4 * pairs} and vocab >="
            f" {2 * pairs + 2}, got {time} and {vocab}."
        )
    random = np.random.default_rng(seed)
    inputs = np.zeros((examples, time), np.int64)
    labels = np.full_like(inputs, IGNORED)
    places = (time - 2 * pairs) // 2  # a query and its answer take two tokens
    weights = np.arange(1, places + 1, dtype=np.float64) ** (POWER - 1)
    weights /= weights.sum()
    for row, label in zip(inputs, labels, strict=True):
        keys = random.choice(np.arange(1, vocab // 2), pairs, replace=False)
        values = random.choice(np.arange(vocab // 2, vocab), pairs)
        row[: 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
        at = 2 * pairs + 2 * random.choice(places, pairs, replace=False, p=weights)
        row[at], row[at + 1] = keys, values
        label[at] = values
    return Task(inputs, labels)


POWER = 0.01
"""Exponent of the power law of `associative_recall`, that of the published task."""


def parity(examples: int, time: int, *, seed: int) -> Task:
    """Bits; after each, whether the number of ones so far is odd.

    Args:
      examples: number of sequences b.
      time: length t >= 1.
      seed: of NumPy's `default_rng`.

    Merrill et al., The illusion of state in state-space models (2024), arXiv:2404.08819; Grazzi et
    al., Unlocking state-tracking in linear RNNs through negative eigenvalues (2024),
    arXiv:2411.12537: decays between 0 and 1 cannot do it at every length.
    """
    _check_length("parity", time)
    bits = np.random.default_rng(seed).integers(0, 2, (examples, time))
    return Task(bits, np.cumsum(bits, axis=1) % 2)


def modular_arithmetic(examples: int, time: int, *, modulus: int = 5, seed: int) -> Task:
    """Digits and operators in turn, such as 3 * 2 - 4, worked out from left to right; after each
    digit, the value so far.

    Args:
      examples: number of sequences b.
      time: length t >= 1; odd positions hold operators.
      modulus: m >= 2. Tokens 0 .. m-1 are digits, m, m+1 and m+2 are +, - and *.
      seed: of NumPy's `default_rng`.

    Deletang et al., Neural networks and the Chomsky hierarchy (2022), arXiv:2207.02098, appendix A,
    where products come first.
    """
    _check_length("modular_arithmetic", time)
    if modulus < 2:
        raise ValueError(f"modular_arithmetic: modulus must be >= 2, got {modulus}.")
    random = np.random.default_rng(seed)
    inputs = random.integers(0, modulus, (examples, time))
    inputs[:, 1::2] = modulus + random.integers(0, 3, (examples, time // 2))
    labels = np.full_like(inputs, IGNORED)
    value = labels[:, 0] = inputs[:, 0]
    for t in range(2, time, 2):
        digit, operator = inputs[:, t], inputs[:, t - 1] - modulus
        value = np.choose(operator, [value + digit, value - digit, value * digit]) % modulus
        labels[:, t] = value
    return Task(inputs, labels)


def permutations(examples: int, time: int, *, elements: int = 5, seed: int) -> Task:
    """Swaps of two places, and after each the order in which the elements stand now.

    Token i is the i-th pair of places; a label is the number of an order among all, sorted. From
    five elements on the orders are a group that cannot be solved, which makes this as hard as any
    computation with a finite state: no model of fixed depth that is parallel over time does it at
    every length.

    Args:
      examples: number of sequences b.
      time: length t >= 1.
      elements: 2 to 6.
      seed: of NumPy's `default_rng`.

    Merrill et al. (2024), arXiv:2404.08819, section 5, where tokens are all orders.
    """
    _check_length("permutations", time)
    if not 2 <= elements <= 6:
        raise ValueError(f"permutations: elements must lie in 2 .. 6, got {elements}.")
    swaps = np.array(list(itertools.combinations(range(elements), 2)))
    inputs = np.random.default_rng(seed).integers(0, len(swaps), (examples, time))
    orders = list(itertools.permutations(range(elements)))
    number = {order: i for i, order in enumerate(orders)}
    # What each swap makes of each order.
    after = np.empty((len(swaps), len(orders)), np.int64)
    for i, (left, right) in enumerate(swaps):
        for j, order in enumerate(orders):
            new = list(order)
            new[left], new[right] = new[right], new[left]
            after[i, j] = number[tuple(new)]
    labels = np.empty_like(inputs)
    state = np.zeros(examples, np.int64)
    for t in range(time):
        state = labels[:, t] = after[inputs[:, t], state]
    return Task(inputs, labels)


def _check_length(name: str, time: int) -> None:
    if time < 1:
        raise ValueError(f"{name}: t must be >= 1, got {time}.")
