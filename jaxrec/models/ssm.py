"""Language models of S5, S4D and LSSL layers: linear recurrences that do not depend on the input.

    x = x + glu(gelu(layer(norm(x)))),   x = x + mlp(norm(x)) for every layer;
    logits = soft_cap(embed^T norm(x))

They are what the selective recurrences (`models.mamba`, `models.linear_rnn`) are measured by: the
same state, without a gate that decides what enters it.

Smith et al., S5 (2022), arXiv:2208.04933; Gu et al., S4D (2022), arXiv:2206.11893; Gu et al., LSSL
(2021), arXiv:2110.13985.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
from flax import nnx
from jax import Array

from jaxrec.config import above, at_least, one_of
from jaxrec.layers.gated_activation import GatedActivation
from jaxrec.layers.linear import truncated_normal
from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.recurrent_lm import RecurrentLM, Unlooped
from jaxrec.layers.residual import ResidualBlock
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.layers.ssm import check_steps, decay_measures

Kind = Literal["s5", "s4d", "lssl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSMConfig(Unlooped):
    """Sizes, in channels, layers and tokens."""

    vocab_size: int
    width: int
    # Of s5 the conjugate pairs of its one system; of s4d and lssl the states of each feature, both
    # of a pair counted.
    state_size: int
    mlp_width: int  # inner width of the gated MLP
    layers: int
    context: int  # longest sequence in training; the state itself has no limit
    kind: Kind = "s5"
    dt_min: float = 1e-3  # steps begin log-uniform; 1 / dt is how many tokens a state spans
    dt_max: float = 1e-1
    logits_soft_cap: float | None = 30.0  # logits are cap * tanh(logits / cap)
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "width", "state_size", "mlp_width", "layers", "context")
        one_of(self, "kind", get_args(Kind))
        above(self, 0, "dt_min", "dt_max", "logits_soft_cap")
        check_steps("SSMConfig", self.dt_min, self.dt_max)
        at_least(self, 0, "norm_epsilon")
        _ = self.layer

    @property
    def layer(self) -> S5Config | S4DConfig | LSSLConfig:
        """That of every block; the LSSL has its A and dt trained."""
        sizes: dict[str, Any] = {
            "width": self.width,
            "state": self.state_size,
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
        }
        if self.kind == "lssl":
            return LSSLConfig(**sizes, train_transition=True, train_step=True)
        return S4DConfig(**sizes) if self.kind == "s4d" else S5Config(**sizes, clip_eigs=True)

    def build(self, *, rngs: nnx.Rngs) -> RecurrentLM:
        """A freshly initialised model."""
        return RecurrentLM(
            self,
            functools.partial(_block, self),
            norm=RMSNorm(self.width, epsilon=self.norm_epsilon),
            embedding_init=truncated_normal(self.width**-0.5),
            embedding_scale=self.width**0.5,
            soft_cap=self.logits_soft_cap,
            rngs=rngs,
        )

    def flops_per_token(self, time: int, depth: None = None, *, training: bool = False) -> float:
        """Multiplications and additions of all products; three times as many in training."""
        d, n = self.width, self.state_size
        products = {"s5": 4 * d * n, "s4d": 4 * d * n, "lssl": d * n * (n + 2)}[self.kind]
        mixer = products + 2 * d * d
        mlp = 3 * d * self.mlp_width
        forward = 2 * (self.layers * (mixer + mlp) + d * self.vocab_size)
        return forward * (3 if training else 1)


class SSMMixer(nnx.Module):
    """y = W1 g * sigmoid(W2 g), g = gelu(layer(x)): the layer, and what mixes its features."""

    def __init__(self, config: SSMConfig, *, rngs: nnx.Rngs):
        self.layer: Any = config.layer.build(rngs=rngs)
        self.activation = GatedActivation(
            "full_glu", config.width, config.width, mix=True, rngs=rngs
        )

    def init_state(self, batch: int) -> Array:
        """That of the layer: float32, or complex64 of two."""
        return self.layer.init_state(batch)

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps x (b t d) to (b t d); `reset` bool (b t), True where a document begins."""
        y, last = self.layer(x, state, reset=reset)
        return self.activation(y.reshape(x.shape)), last

    def measure(self, x: Array, state: Array, *, reset: Array | None = None) -> dict[str, Array]:
        """`layers.ssm.decay_measures` of the layer, which depends on no input."""
        return decay_measures(self.layer.largest_decay())


def _block(config: SSMConfig, rngs: nnx.Rngs) -> ResidualBlock:
    d, writers = config.width, 2 * config.layers
    mlp = GatedMLP(
        d,
        config.mlp_width,
        init=truncated_normal(d**-0.5),
        out_init=truncated_normal((writers * config.mlp_width) ** -0.5),
        activation=jax.nn.gelu,
        rngs=rngs,
    )
    norm = functools.partial(RMSNorm, d, epsilon=config.norm_epsilon)
    return ResidualBlock(SSMMixer(config, rngs=rngs), mlp, norm=norm)


TINY_S5 = SSMConfig(vocab_size=272, width=128, state_size=64, mlp_width=448, layers=4, context=1024)
"""Bytes; 0.99 M parameters, about as many as huginn:TINY."""

TINY_S4D = dataclasses.replace(TINY_S5, kind="s4d")
"""The same of S4D layers; 0.92 M."""

TINY_LSSL = dataclasses.replace(TINY_S5, kind="lssl", state_size=32)
"""The same of LSSLs; 0.88 M, whose dense states are run one step after another."""
