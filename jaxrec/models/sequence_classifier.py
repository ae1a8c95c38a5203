"""One label for a whole sequence, by a stack of state-space layers.

    x = W_in u;   x = x + dropout(act(mixer(norm(x))))   for each block;   logits = W_out mean_t x_t

or, without prenorm, x = norm(x + dropout(act(mixer(x)))). The mixer is S5, S4D, LSSL, Mamba, or the
RG-LRU as a baseline with a real decay. The originals normalise over the batch; here layer norm
stands in its place everywhere, so that a model holds no statistics and examples do not talk.

Smith et al., S5 (2022), arXiv:2208.04933, section 6 and appendix G; Gu et al., LSSL (2021),
arXiv:2110.13985, appendix E.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrec.config import at_least, one_of
from jaxrec.layers.axes import constrain
from jaxrec.layers.gated_activation import Activation, GatedActivation
from jaxrec.layers.linear import Linear
from jaxrec.layers.lssl import LSSL, LSSLConfig
from jaxrec.layers.mamba import Mamba
from jaxrec.layers.norm import LayerNorm
from jaxrec.layers.rglru import RGLRU, RGLRUConfig
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5, S5Config
from jaxrec.layers.ssm import decay_measures
from jaxrec.ops.depth import RematPolicy, remat_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaMixerConfig:
    """Mamba, whose time steps depend on the input and are none of the signal's."""

    width: int
    inner_width: int  # channels of the recurrence; published: 2 width
    step_rank: int  # bottleneck through which step sizes come; published: width / 16
    state_size: int = 16  # numbers kept for each inner channel
    conv_width: int = 4

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "inner_width", "step_rank", "state_size")
        at_least(self, 2, "conv_width")

    def build(self, *, rngs: nnx.Rngs) -> Mamba:
        """A freshly initialised layer."""
        return Mamba(
            self.width,
            self.inner_width,
            self.state_size,
            self.step_rank,
            conv_width=self.conv_width,
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifierConfig:
    """Sizes and what a block is made of."""

    inputs: int  # features of each step
    classes: int
    # Its width is the width of the stream.
    mixer: S5Config | S4DConfig | LSSLConfig | MambaMixerConfig | RGLRUConfig
    layers: int
    activation: Activation = "half_glu1"
    prenorm: bool = True  # normalise what a block reads, instead of what it leaves
    dropout: float = 0.0  # share of the channels that a block's output loses, for all steps alike
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "inputs", "classes", "layers")
        one_of(self, "activation", get_args(Activation))
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"SequenceClassifierConfig: dropout must lie in [0, 1), got {self.dropout}."
            )
        if self.outputs > 1 and self.activation.startswith("half_glu"):
            raise ValueError(
                f"SequenceClassifierConfig: {self.activation} gates the features themselves, but"
                f" the mixer has {self.outputs} outputs for each; use gelu or full_glu."
            )

    @property
    def width(self) -> int:
        """Model width d."""
        return self.mixer.width

    @property
    def outputs(self) -> int:
        """What a mixer gives for each feature."""
        return self.mixer.outputs if isinstance(self.mixer, LSSLConfig) else 1

    @property
    def has_time_steps(self) -> bool:
        """Whether the mixer is a system in continuous time, whose steps can be scaled."""
        return isinstance(self.mixer, S5Config | S4DConfig | LSSLConfig)

    def build(self, *, rngs: nnx.Rngs) -> "SequenceClassifier":
        """A freshly initialised model."""
        return SequenceClassifier(self, rngs=rngs)


class MixerBlock(nnx.Module):
    """Mixer and activation, normalised and added to the stream."""

    def __init__(self, config: SequenceClassifierConfig, *, rngs: nnx.Rngs):
        self.prenorm = config.prenorm
        self.dropout = config.dropout
        self.norm = LayerNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = config.mixer.build(rngs=rngs)
        self.activation = GatedActivation(
            config.activation,
            config.width * config.outputs,
            config.width,
            mix=isinstance(config.mixer, S4DConfig | LSSLConfig),
            rngs=rngs,
        )

    def __call__(
        self, x: Array, valid: Array, step_rescale: float | Array, key: Array | None
    ) -> Array:
        """Maps x (b t d) to (b t d); `valid` (b t), and no dropout without a key."""
        y = self.norm(x) if self.prenorm else x
        y = self.activation(self._mix(y, valid, step_rescale))
        if key is not None and self.dropout:
            shape = (y.shape[0], 1, y.shape[2])
            kept = jax.random.bernoulli(key, 1 - self.dropout, shape)
            y = jnp.where(kept, y / (1 - self.dropout), 0)
        x = x + y
        return constrain(x if self.prenorm else self.norm(x), "batch", "time", None)

    def _mix(self, x: Array, valid: Array, step_rescale: float | Array) -> Array:
        """Only S5 may look back from the padding at the end, and needs to know it."""
        if isinstance(self.mixer, RGLRU):
            begin = jnp.zeros_like(valid).at[:, 0].set(True)
            return self.mixer(x, self.mixer.init_state(x.shape[0]), reset=begin)[0]
        if isinstance(self.mixer, Mamba):
            return self.mixer(x, self.mixer.init_state(x.shape[0]))[0]
        if isinstance(self.mixer, S5):
            return self.mixer(x, valid=valid, step_rescale=step_rescale)[0]
        y, _ = self.mixer(x, step_rescale=step_rescale)
        return y.reshape(*x.shape[:2], -1) if isinstance(self.mixer, LSSL) else y


class SequenceClassifier(nnx.Module):
    """The model. It reads a sequence as a whole and therefore carries no state."""

    def __init__(self, config: SequenceClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.lecun_normal()
        self.encoder = Linear(
            config.inputs, config.width, init=init, axes=(None, "embed"), bias=True, rngs=rngs
        )
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: MixerBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.decoder = Linear(
            config.width, config.classes, init=init, axes=("embed", None), bias=True, rngs=rngs
        )

    def __call__(
        self,
        x: Array,
        lengths: Array | None = None,
        *,
        step_rescale: float | Array = 1.0,
        key: Array | None = None,
        remat: RematPolicy = "none",
    ) -> Array:
        """Scores the classes.

        Args:
          x: input (b t inputs).
          lengths: valid steps of each sequence, int (b) >= 1; what comes after them changes
            nothing. None: all.
          step_rescale: factor on every time step, for a signal sampled at another rate than in
            training: 2 for every second sample, 1/2 for twice as many; S5 takes one for every step
            too, (b t), for samples at unequal intervals. Mamba and the RG-LRU have none.
          key: of dropout; None drops nothing.
          remat: what the gradient stores, see `ops.depth.remat_scan`.

        Returns:
          Logits (b classes), float32.
        """
        batch, time, _ = x.shape
        lengths = jnp.full(batch, time) if lengths is None else lengths
        valid = jnp.arange(time)[None] < lengths[:, None]
        # A convolution by FFT would carry a large or infinite input everywhere.
        x = constrain(self.encoder(jnp.where(valid[..., None], x, 0)), "batch", "time", None)
        keys = None if key is None else jax.random.split(key, self.config.layers)

        def body(x: Array, layer: tuple[MixerBlock, Array | None]) -> tuple[Array, None]:
            block, block_key = layer
            return block(x, valid, step_rescale, block_key), None

        with jax.named_scope("blocks"):
            x, _ = remat_scan(body, x, (self.blocks, keys), remat=remat)
        with jax.named_scope("head"):
            total = jnp.sum(jnp.where(valid[..., None], x, 0), axis=1, dtype=jnp.float32)
            mean = total / lengths[:, None].astype(jnp.float32)
            return self.decoder(mean).astype(jnp.float32)

    def decay_measures(self) -> dict[str, Array]:
        """`layers.ssm.decay_measures` of the worst layer; nothing if the mixer is always stable."""
        if not self.config.has_time_steps:
            return {}
        decays = jax.lax.map(lambda block: block.mixer.largest_decay(), self.blocks)
        return decay_measures(decays)


DIGITS = SequenceClassifierConfig(
    inputs=1,
    classes=10,
    mixer=S5Config(width=48, state=16, dt_min=0.01, dt_max=0.3),
    layers=2,
    activation="full_glu",
    dropout=0.1,
)
"""8 x 8 digits as 64 pixels in a row: the S5 of experiments/s4_lssl, 16,522 parameters."""

LRA_LISTOPS = SequenceClassifierConfig(
    inputs=15,
    classes=10,
    mixer=S5Config(width=128, state=8, blocks=8, bidirectional=True),
    layers=8,
    activation="half_glu2",
)
"""Nested operations on digits in up to 2000 symbols, one-hot: ten digits, four operators and the
bracket that closes; with the sizes of S5's published run."""

LRA_TEXT = SequenceClassifierConfig(
    inputs=256,
    classes=2,
    mixer=S5Config(width=256, state=96, blocks=12, bidirectional=True),
    layers=6,
    activation="half_glu2",
    dropout=0.1,
)
"""Opinions on films in up to 4096 bytes, one-hot, with the sizes of S5's published run."""

LRA_IMAGE = SequenceClassifierConfig(
    inputs=1,
    classes=10,
    mixer=S5Config(width=512, state=192, blocks=3, bidirectional=True, clip_eigs=True),
    layers=6,
    dropout=0.1,
)
"""Grey CIFAR-10 as 1024 pixels in a row, with the sizes of S5's published run."""

LRA_PATHFINDER = SequenceClassifierConfig(
    inputs=1,
    classes=2,
    mixer=S5Config(
        width=192,
        state=128,
        blocks=8,
        bidirectional=True,
        output_init="trunc_standard_normal",
    ),
    layers=6,
    dropout=0.05,
)
"""Whether two points are joined, in 1024 pixels in a row, with the sizes of S5's published run."""

LRA_PATH_X = SequenceClassifierConfig(
    inputs=1,
    classes=2,
    mixer=S5Config(
        width=128,
        state=128,
        blocks=16,
        bidirectional=True,
        output_init="complex_normal",
        dt_min=1e-4,
    ),
    layers=6,
)
"""The same in 16384 pixels, with the sizes of S5's published run."""

SPEECH_COMMANDS = SequenceClassifierConfig(
    inputs=1,
    classes=35,
    mixer=S5Config(width=96, state=64, blocks=16, bidirectional=True),
    layers=6,
    dropout=0.1,
)
"""One of 35 words in a second of sound, 16000 samples, with the sizes of S5's published run."""
