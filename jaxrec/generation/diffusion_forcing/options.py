"""Options of the parallel sampler, checked when they are made."""

from dataclasses import dataclass
from typing import Literal, get_args

Freeze = Literal[
    "latent-diff", "latent-acceleration-1", "latent-acceleration-2", "token-stability", "fixed"
]


@dataclass(frozen=True, kw_only=True)
class DiffusionForcing:
    """Options of the sampler; those of the paper's table of results are the default."""

    inner_loops: int = 4  # loops per outer step
    freeze: Freeze = "latent-diff"  # when a position is settled
    threshold: float = 0.03  # of the latent rules: largest |change of S| / |S| that is settled
    embedding_ema: float = 0.1  # part of the embeddings before that is kept; in [0, 1)
    noise: float = 0.0  # part of the latent states that becomes noise before each outer step
    dampened: bool = True  # noise / (1 + loops that the position had)
    sqrt_mixer: bool = False  # sqrt(1 - b) S + sqrt(b) z instead of (1 - b) S + b z
    headway: int = 1  # new positions per outer step; guesses of all but the first are random, from
    # the whole vocabulary (the original leaves out the last 26 tokens of its own)
    continuous: bool = False  # new positions begin at the last latent states
    max_wavefront: int = 128  # largest window in positions; 0: the context
    full_prefill: bool = True  # prompts run at full depth first; otherwise they begin the window
    latent_scale: float = 1.0  # multiplies initial latent states; 0 begins at zero
    max_steps: int = 4096  # outer steps after which a row ends anyway
    strategy: str | None = None  # of the cache; None: the last loop only
    may_rewrite_prompt: bool = False  # unfinished prompts may settle from the left, as in the
    # original; otherwise a prompt stays what it is

    def __post_init__(self) -> None:
        if self.freeze not in get_args(Freeze):
            raise ValueError(
                f"freeze must be one of {', '.join(get_args(Freeze))}, got {self.freeze!r}."
            )
        for name, least in (("inner_loops", 1), ("headway", 1), ("max_wavefront", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}.")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"The freeze threshold must be > 0 and finite, got {self.threshold}.")
        if not 0 <= self.embedding_ema < 1:
            raise ValueError(f"embedding_ema must be in [0, 1), got {self.embedding_ema}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], got {self.noise}.")
        if 0 < self.max_wavefront < self.headway:
            raise ValueError(
                f"A window of max_wavefront {self.max_wavefront} positions cannot hold the"
                f" {self.headway} new ones of a step. Lower headway."
            )
