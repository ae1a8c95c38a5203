"""JRT-RNN: a hybrid language model that reads a prompt without causality before it goes on.

    x = x + mixer(norm(x));   x = x + mlp(norm(x));   logits = embed^T norm(x)

A mixer is prefix linear attention, attention over a window of the last tokens with rotary
positions, or a gated short convolution; the published models have a few of the first two.

Training reads the first part of a text as a prefix, with some of its tokens masked, and the rest
causally:

    loss = mean_{t after the prefix} -log p(x_{t+1}) + w mean_{t masked} -log p(x_t)

Arora et al., Just read twice: closing the recall gap for recurrent language models (2024),
arXiv:2407.05483. Of the published layers only the prefix linear attention could be checked against
the original; there is no conversion.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from jaxrec.config import above, at_least, multiple_of
from jaxrec.layers.attention import Attention
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.layers.gated_conv import GatedConv
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.prefix_linear_attention import PrefixLinearAttention
from jaxrec.layers.recurrent_lm import Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.ops import attention, notes, segments
from jaxrec.ops.depth import RematPolicy, remat_step

Mixer = Literal["conv", "linear", "attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLMConfig(Unlooped):
    """Sizes, in channels and tokens; `mixers` has one entry per layer."""

    vocab_size: int
    width: int
    mixers: tuple[Mixer, ...]
    heads: int  # of linear attention and of attention, each width / heads wide
    mlp_width: int  # inner width of the gated MLP
    feature_width: int = 16  # channels of a query before the feature map
    window: int = 256  # tokens that attention sees, the present one included
    conv_width: int = 3
    conv_expand: int = 4  # inner channels of a gated convolution, in widths
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    reads_prefix: bool = True  # generation reads prompts as a prefix; False: causally
    prefix_share: float = 0.5  # of a training sequence, if prompts are read as a prefix
    mask_share: float = 0.15  # of the prefix, in training
    mask_weight: float = 0.25  # w, of the masked-token loss
    context: int = 2048  # longest sequence in training; the state itself has no limit

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "mlp_width", "feature_width", "window")
        at_least(self, 1, "conv_expand", "context")
        at_least(self, 2, "conv_width")
        at_least(self, 0, "norm_epsilon", "mask_weight")
        if not (0 <= self.prefix_share < 1 and 0 <= self.mask_share <= 1):
            raise ValueError(
                "PrefixLMConfig: prefix_share must lie within [0, 1) and mask_share within [0, 1],"
                f" got {self.prefix_share} and {self.mask_share}."
            )
        above(self, 0, "rotary_base")
        multiple_of(self, "heads", "width")
        if not self.mixers or not set(self.mixers) <= set(get_args(Mixer)):
            raise ValueError(
                f"PrefixLMConfig: mixers must be made of {get_args(Mixer)}, got {self.mixers}."
            )
        if "attention" in self.mixers and self.head_width % 2:
            raise ValueError(
                f"PrefixLMConfig: attention needs heads of even width, got {self.head_width}."
            )

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def mask_token(self) -> int:
        """What stands for a masked token: the last of the vocabulary, so text should not use it."""
        return self.vocab_size - 1

    def text_prefix(self, segment_ids: Array) -> Array | None:
        """What training and evaluation give as the prefix of each row of text, bool (b t): its
        first part, or less where the first document of the row ends before; None: nothing.
        """
        length = int(self.prefix_share * segment_ids.shape[1])
        if not (self.reads_prefix and length):
            return None
        place = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
        return (place < length) & (segment_ids == segment_ids[:, :1])

    def build(self, *, rngs: nnx.Rngs) -> "PrefixLM":
        """A freshly initialised model."""
        return PrefixLM(self, rngs=rngs)

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all matrix products, linear attention as two products
        with its state, without a prefix; three times as many in training.
        """
        features = 1 + self.feature_width + self.feature_width**2
        seen = time / 2 if time <= self.window else self.window * (1 - self.window / (2 * time))
        inner = self.conv_expand * self.width
        mixing = {
            "conv": 3.0 * self.width * inner + self.conv_width * inner,
            "linear": 2.0 * self.width * (self.width + self.heads * self.feature_width)
            + 2 * features * self.width,
            "attention": 4.0 * self.width**2 + 2 * seen * self.width,
        }
        forward = sum(mixing[mixer] + 3 * self.width * self.mlp_width for mixer in self.mixers)
        return 2 * (forward + self.width * self.vocab_size) * (3 if training else 1)


def _block(config: PrefixLMConfig, mixer: Mixer, rngs: nnx.Rngs) -> ResidualBlock:
    # What writes to the stream shrinks with the number of writers, so that its scale does not grow
    # with depth.
    def out_init(inputs: int) -> Any:
        return truncated_normal((2 * len(config.mixers) * inputs) ** -0.5)

    init = truncated_normal(config.width**-0.5)
    options = {"init": init, "out_init": out_init(config.width), "rngs": rngs}
    mixing: Any
    if mixer == "conv":
        inner = config.conv_expand * config.width
        options["out_init"] = out_init(inner)
        mixing = GatedConv(config.width, inner, conv_width=config.conv_width, **options)
    elif mixer == "linear":
        mixing = PrefixLinearAttention(config.width, config.heads, config.feature_width, **options)
    else:
        mixing = Attention(
            config.width,
            config.heads,
            rotary_base=config.rotary_base,
            window=config.window,
            **options,
        )
    mlp = GatedMLP(
        config.width, config.mlp_width, init=init, out_init=out_init(config.mlp_width), rngs=rngs
    )
    return ResidualBlock(mixing, mlp, norm=functools.partial(_norm, config))


def _norm(config: PrefixLMConfig) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon)


class PrefixLMState(NamedTuple):
    """What is carried from one call to the next; its size is bounded by the window."""

    mixers: tuple[Array, ...]  # of the layers without attention, in order
    cache: attention.KVCache  # a ring, with one slot per layer of attention
    segment: Array  # int32 (b): segment of the last token; segments.NOTHING before the first


class PrefixLM(nnx.Module):
    """The model."""

    def __init__(self, config: PrefixLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = truncated_normal(config.width**-0.5)
        self.embedding = Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        self.layers = nnx.List([_block(config, mixer, rngs) for mixer in config.mixers])
        self.norm = _norm(config)

    def init_state(
        self, batch: int, *, capacity: int | None = None, depth: int | None = None
    ) -> PrefixLMState:
        """The state before the first token, with room for `capacity` tokens if they are fewer than
        the window, and for any number otherwise.
        """
        config = self.config
        cache = attention.init_cache(
            config.mixers.count("attention"),
            batch,
            min(capacity or config.window, config.window),
            config.heads,
            config.head_width,
            self.embedding.table[...].dtype,
        )
        return PrefixLMState(self._zero_states(batch), cache, segments.before_the_first(batch))

    def _zero_states(self, batch: int) -> tuple[Array, ...]:
        return tuple(
            block.init_state(batch)
            for block, mixer in zip(self.layers, self.config.mixers, strict=True)
            if mixer != "attention"
        )

    def __call__(
        self,
        tokens: Array,
        state: PrefixLMState | None = None,
        *,
        prefix: Array | None = None,
        segment_ids: Array | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Array, PrefixLMState | None]:
        """Scores the next token at every position.

        Args:
          tokens: int (b t).
          state: from `init_state` or the call before; None begins anew and keeps nothing.
          prefix: bool (b t), the tokens that linear attention lets all others see; None: none. At
            most one document of a row may have one.
          segment_ids: int (b t) >= 0; where the id changes a document begins that sees nothing of
            the one before. None: the last segment goes on.
          remat: what the gradient stores, see `ops.depth.remat_step`; a step is a block.

        Returns:
          Logits (b t vocab), float32, and the next state.
        """
        batch, time = tokens.shape
        if state is None:
            mixers, cache = self._zero_states(batch), None
            previous = segments.before_the_first(batch)
        else:
            mixers, cache, previous = state
        view, cache = attention.open_view(
            cache, (batch, time), segment_ids, window=self.config.window
        )
        if segment_ids is None:
            segment_ids = segments.continued(previous, time)
        reset = segments.resets(segment_ids, previous)
        x = constrain(self.embedding(tokens), "batch", "time", None)
        before, after, slot = list(mixers), [], 0
        for block, mixer in zip(self.layers, self.config.mixers, strict=True):
            options: dict[str, Any] = {"reset": reset}
            if mixer == "attention":
                options = {"view": view, "slot": slot}
            elif mixer == "linear":
                options["prefix"] = prefix
            run: Any = remat_step(functools.partial(_run, **options), remat=remat)
            if mixer == "attention":
                x, cache = run(block, x, cache)
                slot += 1
            else:
                x, new = run(block, x, before.pop(0))
                after.append(new)
            notes.note("stream", x)
        with jax.named_scope("head"):
            logits = self.embedding.logits(self.norm(x))
        if state is None or cache is None:
            return logits, None
        return logits, PrefixLMState(tuple(after), cache, segment_ids[:, -1])

    def train_call(
        self, tokens: Array, *, key: Array, prefix: Array | None = None, **options: Any
    ) -> tuple[Array, Array | None]:
        """Logits after a prefix of which a share is masked, and w times the mean masked-token loss,
        the same for every token, so that it joins the mean of the next-token loss whatever that is
        taken over; None without a prefix or a share. See `models.protocol`.
        """
        config = self.config
        if prefix is None or not config.mask_share:
            return self(tokens, prefix=prefix, **options)[0], None
        masked = mask(prefix, config.mask_share, key)
        seen = jnp.where(masked, config.mask_token, tokens)
        logits, _ = self(seen, prefix=prefix, **options)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        count = jnp.sum(masked, dtype=losses.dtype)
        mean = jnp.sum(jnp.where(masked, losses, 0)) / jnp.maximum(count, 1)
        return logits, jnp.broadcast_to(config.mask_weight * mean, tokens.shape)


def mask(prefix: Array, share: float, key: Array) -> Array:
    """The tokens of a prefix, bool (b t), that are masked: each with the probability `share`."""
    return prefix & jax.random.bernoulli(key, share, prefix.shape)


def _run(block: ResidualBlock, x: Array, state: Any, **options: Any) -> tuple[Array, Any]:
    return block(x, state, **options)


TINY = PrefixLMConfig(
    vocab_size=272,
    width=128,
    mixers=("conv", "linear", "attention", "conv"),
    heads=4,
    mlp_width=256,
    feature_width=8,
    conv_expand=2,
    context=1024,
)
"""Bytes; 0.8 M parameters."""


def _published(width: int, layers: int, linear: tuple[int, ...]) -> PrefixLMConfig:
    """Attention follows each linear layer; the rest are convolutions."""
    mixers: list[Mixer] = ["conv"] * layers
    for place in linear:
        mixers[place : place + 2] = ["linear", "attention"]
    return PrefixLMConfig(
        vocab_size=50264, width=width, mixers=tuple(mixers), heads=16, mlp_width=2 * width
    )


JRT_360M = _published(1024, 26, (1, 6, 11, 16, 21))
"""The layers of the published JRT-RNN of 360 million parameters."""

JRT_1_3B = _published(1792, 36, (1, 6, 11, 16, 21, 27, 33))
"""The layers of the published JRT-RNN of 1.3 billion parameters."""
