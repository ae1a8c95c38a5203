"""What training, generation and the command line ask of a language model and of its
configuration.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax import Array


class LanguageModel(Protocol):
    """A `flax.nnx` module used as a pytree. Looped models also take `depth` and `key`.

    A model that has something to say of itself beside its loss, such as how many iterations a
    solver takes, has a method `measure(tokens, *, segment_ids) -> {name: scalar}`. Training calls
    it on one batch at every evaluation and logs what it gives.

    A model that is trained in another way than it is used, with dropout or at a price for what it
    does, has a method `train_call(tokens, *, key, segment_ids, remat, ...) -> (logits, penalty)`:
    penalty, (b t) float32 or None, is added to the loss of every token that counts. The loss that
    training logs is their sum; evaluation calls the model and has no penalty.
    """

    config: Any

    def init_state(self, batch: int, *, capacity: int, depth: int | None = None) -> Any:
        """State before the first token, with room for `capacity` tokens and, if looped, `depth`
        loops.
        """
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        """(tokens, state=None, *, segment_ids=None, ...) -> (logits, state).

        Maps tokens (b t) to logits (b t vocab), float32, and the next state. With `state=None`
        nothing is kept. A change of `segment_ids` (b t) begins another document; None goes on with
        the last one.
        """
        ...


@runtime_checkable
class LanguageModelConfig(Protocol):
    """A frozen dataclass that fixes an architecture."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence that the model is meant for."""
        ...

    @property
    def mean_depth(self) -> int | None:
        """Mean number of loops in training; None for a model without a loop."""
        ...

    def build(self, *, rngs: nnx.Rngs) -> LanguageModel:
        """A freshly initialised model."""
        ...

    def sample_depth(self, rng: np.random.Generator) -> int | None:
        """Draws the number of loops of one training step; None for a model without a loop."""
        ...

    def flops_per_token(
        self, time: int, depth: int | None = None, *, training: bool = False
    ) -> float:
        """Floating-point operations for one token of a sequence of `time` tokens; forward, or a
        training step.
        """
        ...


def loop_inputs(
    config: LanguageModelConfig, depth: int | Array | None, key: Array | None
) -> dict[str, Any]:
    """Keyword arguments by which a looped model gets its depth and the key of its initial latent
    state.

    Empty for a model without a loop, which then can be called in the same way.
    """
    return {} if config.mean_depth is None else {"depth": depth, "key": key}


def training_call(
    model: Any, tokens: Array, key: Array, options: dict[str, Any]
) -> tuple[Array, Array | None]:
    """Logits (b t vocab) as training wants them, and what each token adds to the loss, (b t) or
    None, see `LanguageModel`; the key is for models with a `train_call`, options are those of a
    call.
    """
    if hasattr(model, "train_call"):
        return model.train_call(tokens, **options | {"key": key})
    return model(tokens, **options)[0], None


def text_prefix(config: LanguageModelConfig, segment_ids: Array) -> Array | None:
    """What of a text with segments (b t) is only given, bool (b t): models that are trained to go
    on from a prefix have it as their argument `prefix`, and are not asked for the tokens that
    follow those of the prefix. None for others.
    """
    return config.text_prefix(segment_ids) if hasattr(config, "text_prefix") else None


def prefix_inputs(config: LanguageModelConfig, prompt: Array) -> dict[str, Any]:
    """`prefix` for models that read a prompt, bool (b t), without causality; none for others."""
    return {"prefix": prompt} if getattr(config, "reads_prefix", False) else {}
