"""What a text costs without a neural network: gzip, and a byte model of fixed order.

Both answer in bits per byte of the validation text, to print beside a language model's. gzip sees
the validation text alone and adapts to it as it goes; the byte model is estimated on the training
text and then fixed, as a language model is.
"""

import gzip
from dataclasses import dataclass

import numpy as np

from jaxrec.errors import UserError


def gzip_bits_per_byte(text: bytes) -> float:
    """Returns 8 len(gzip(text)) / len(text) at gzip's highest level (9), header included.

    Raises:
      UserError: the text is empty.
    """
    if not text:
        raise UserError("gzip_bits_per_byte: the text is empty.")
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def ngram_bits_per_byte(
    train: bytes, valid: bytes, order: int = 3, max_train_bytes: int | None = None
) -> float:
    """Returns the mean of -log2 p(x_i | the `order` bytes before) over the bytes of `valid`.

    See `NGram` for p. The first bytes of `valid` are predicted from the shorter contexts there are.

    Args:
      train: text to count in.
      valid: text to judge by, not part of `train`.
      order: bytes of context, 0 to 7.
      max_train_bytes: count only in this many first bytes of `train`; None: in all. A second or two
        per 10 MB.

    Raises:
      UserError: a text is empty or the order out of range.
    """
    if not valid:
        raise UserError("ngram_bits_per_byte: the validation text is empty.")
    model = NGram.fit(train[:max_train_bytes], order)
    return float(-np.log2(model.probabilities(valid)).mean())


@dataclass(frozen=True)
class _Counts:
    """What followed each context of one length in a text.

    Attributes:
      contexts: the different contexts, packed, sorted, (c,).
      totals, distinct: n and T of each, (c,).
      grams: the different 256 context + byte, sorted, (g,).
      gram_counts: how often each occurs, (g,).
    """

    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray
    grams: np.ndarray
    gram_counts: np.ndarray


@dataclass(frozen=True)
class NGram:
    """A byte model of fixed order with Witten-Bell smoothing.

        p_k(x | c_k) = (n(c_k x) + T(c_k) p_{k-1}(x | c_{k-1})) / (n(c_k) + T(c_k))
        p_{-1}(x)    = 1 / 256

    where c_k are the last k bytes, n(.) counts occurrences in the training text, n(c_k) is the
    number of bytes that followed c_k and T(c_k) the number of different ones: the more kinds of
    byte have followed a context, the likelier a new one is, and the more weight goes to the shorter
    context. A context never seen has p_k = p_{k-1}.

    Witten & Bell, The zero-frequency problem (1991), IEEE Trans. Information Theory 37(4), method
    C, interpolated; contexts of falling length as in PPM: Cleary & Witten, Data compression using
    adaptive coding and partial string matching (1984), IEEE Trans. Communications 32(4).
    """

    orders: tuple[_Counts, ...]

    @classmethod
    def fit(cls, text: bytes, order: int = 3) -> "NGram":
        """Counts contexts of 0 to `order` bytes in a text.

        Raises:
          UserError: the text is empty or the order is not in 0 .. 7.
        """
        if not 0 <= order <= 7:
            raise UserError(f"The order of a byte model must be in 0 .. 7; got {order}.")
        if not text:
            raise UserError("A byte model needs a training text; this one is empty.")
        data = np.frombuffer(text, np.uint8)
        return cls(
            tuple(_count(_grams(data, length)) for length in range(min(order, len(data) - 1) + 1))
        )

    def probabilities(self, text: bytes) -> np.ndarray:
        """Returns p(x_i | the bytes before it) for each byte of a text, float64 (t,), above 0."""
        data = np.frombuffer(text, np.uint8)
        p = np.full(len(data), 1 / 256)
        for length, counts in enumerate(self.orders):
            if length >= len(data):
                break
            grams = _grams(data, length)
            seen = _look_up(counts.grams, counts.gram_counts, grams)
            total = _look_up(counts.contexts, counts.totals, grams >> 8)
            distinct = _look_up(counts.contexts, counts.distinct, grams >> 8)
            known = total > 0
            shorter = p[length:]  # the first `length` bytes have no context of this length
            mixed = (seen + distinct * shorter) / np.where(known, total + distinct, 1)
            p[length:] = np.where(known, mixed, shorter)
        return p


def _grams(data: np.ndarray, length: int) -> np.ndarray:
    """Packs each byte with the `length` bytes before it, the byte itself lowest: (t - length,)."""
    size = len(data) - length
    grams: np.ndarray = np.zeros(size, np.uint32 if length <= 3 else np.uint64)
    for offset in range(length + 1):
        grams = (grams << 8) | data[offset : offset + size]
    return grams


def _count(grams: np.ndarray) -> _Counts:
    unique, gram_counts = np.unique(grams, return_counts=True)
    contexts, first, distinct = np.unique(unique >> 8, return_index=True, return_counts=True)
    return _Counts(contexts, np.add.reduceat(gram_counts, first), distinct, unique, gram_counts)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
