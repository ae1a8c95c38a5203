"""Linear attention that reads a prefix without causality before it goes on causally.

    S_i = P + sum_{j <= i} phi(k_j) v_j,   z_i = p + sum_{j <= i} phi(k_j)
    y_i = phi(q_i) . S_i / (phi(q_i) . z_i + eps)
    P = sum_{j in prefix} phi(k'_j) v'_j,   p = sum_{j in prefix} phi(k'_j)

with keys k' and values v' of their own for the prefix. Every position sees all of the prefix, those
inside it too, so what was written first is kept in the light of what follows. P is nothing but the
state from which the causal recurrence begins.

Arora et al., Just read twice: closing the recall gap for recurrent language models (2024),
arXiv:2407.05483, section 4.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.nn.initializers import Initializer

from jaxrec.config import at_least, multiple_of
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.layers.scan import matrix_scan_over_time
from jaxrec.ops import feature_maps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLinearAttentionConfig:
    """Sizes of the layer alone, in channels."""

    width: int
    heads: int
    feature_width: int = 16  # of a query or key before the feature map
    epsilon: float = 1e-12  # of the denominator
    masks_before_features: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "feature_width")
        at_least(self, 0, "epsilon")
        multiple_of(self, "heads", "width")

    def build(self, *, rngs: nnx.Rngs) -> "PrefixLinearAttention":
        """A freshly initialised layer."""
        return PrefixLinearAttention(
            self.width,
            self.heads,
            self.feature_width,
            epsilon=self.epsilon,
            masks_before_features=self.masks_before_features,
            init=truncated_normal(self.width**-0.5),
            rngs=rngs,
        )


class PrefixLinearAttention(nnx.Module):
    """The layer, of width d with h heads, whose queries and keys have `feature_width` channels that
    the Taylor map expands to f = 1 + w + w^2. Without a prefix it is causal Based attention.

    With `masks_before_features` padding is zeroed before the feature map, as the original does: phi
    of zero is not zero, so padding is then read like a token of its own. Otherwise after it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feature_width: int = 16,
        *,
        epsilon: float = 1e-12,
        masks_before_features: bool = False,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(
                f"PrefixLinearAttention: width {width} does not divide into {heads} heads."
            )

        self.config = PrefixLinearAttentionConfig(
            width=width,
            heads=heads,
            feature_width=feature_width,
            epsilon=epsilon,
            masks_before_features=masks_before_features,
        )

        def to_heads(channels: int) -> Linear:
            axes = ("embed", "heads", None)
            return Linear(width, (heads, channels), init=init, axes=axes, rngs=rngs)

        self.query, self.key, self.prefix_key = (to_heads(feature_width) for _ in range(3))
        self.value, self.prefix_value = (to_heads(width // heads) for _ in range(2))
        self.out = Linear(width, width, init=out_init or init, axes=("mlp", "embed"), rngs=rngs)
        self.epsilon, self.masks_before_features = epsilon, masks_before_features

    def init_state(self, batch: int) -> Array:
        """Zero state (b h f v+1), float32: sums of phi(k) v and, in the last column, of phi(k)."""
        _, heads, width = self.query.kernel.shape
        return jnp.zeros((batch, heads, 1 + width + width**2, self.value.kernel.shape[-1] + 1))

    def read(self, x: Array, state: Array, prefix: Array) -> Array:
        """The state after a prefix: `state` plus the sums over the tokens of x (b t d) where
        `prefix`, bool (b t), is True.
        """
        keys = self._features(self.prefix_key(x), prefix)
        if self.masks_before_features:  # phi of zero also says something where there is no prefix
            ends_later = lax.cummax(prefix.astype(jnp.int32), axis=1, reverse=True)
            keys = keys * ends_later[..., None, None].astype(jnp.float32)
        values = self.prefix_value(x).astype(jnp.float32)
        values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
        return state + jnp.einsum("bthf,bthv->bhfv", keys, values)

    def __call__(
        self,
        x: Array,
        state: Array,
        *,
        prefix: Array | None = None,
        reset: Array | None = None,
    ) -> tuple[Array, Array]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input (b t d).
          state: from `init_state` or the call before.
          prefix: bool (b t), the tokens that all of their document see; None: none. It belongs to
            the document of its first token: a later reset ends its reach.
          reset: bool (b t), True where a document begins that sees nothing of what lies before it.
            What comes before a document with a prefix is taken for padding and not read at all.
        """
        read = None
        if prefix is not None:
            place = lax.broadcasted_iota(jnp.int32, prefix.shape, 1)
            first = jnp.argmax(prefix, axis=1, keepdims=True).astype(jnp.int32)
            if reset is not None:
                begins = jnp.any(reset & (place <= first), axis=1, keepdims=True)
                state = jnp.where(begins[..., None, None], 0, state)
                reset = reset & (place > first)
                read = (place >= first) | ~begins
            state = self.read(x, state, prefix)
        q = feature_maps.taylor(self.query(x))
        y, state = matrix_scan_over_time(
            q,
            self._features(self.key(x), read),
            self.value(x),
            state=state,
            normalise=self.epsilon,
            reset=reset,
        )
        return self.out(y.reshape(x.shape)), state

    def _features(self, keys: Array, read: Array | None) -> Array:
        if read is None:
            return feature_maps.taylor(keys)
        mask = read[..., None, None]
        if self.masks_before_features:
            return feature_maps.taylor(keys * mask.astype(keys.dtype))
        return feature_maps.taylor(keys) * mask.astype(jnp.float32)
