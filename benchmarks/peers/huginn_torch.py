"""Huginn as plain PyTorch in eager mode: what `jaxrec bench train` is measured against.

The equations of jaxrec/models/huginn.py, written the way a PyTorch user would: fused projections,
`scaled_dot_product_attention`, `silu`, `rms_norm`, complex multiplication for the rotation, a cache
of keys and values that grows by concatenation. Weights come from `jaxrec.convert` under the names
of the published checkpoints, so both programs compute the same function.
"""

import collections
import itertools
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxrec.models.huginn import HuginnConfig

Slot = dict[str, Tensor]  # keys and values (b h t k) of one execution of a block


def rotation(time: int, head_width: int, base: float) -> Tensor:
    """exp(i position frequency), complex (t k/2)."""
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.arange(time, dtype=torch.float32)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring channels of x (b t h k)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2)


class Norm(nn.Module):
    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class SelfAttention(nn.Module):
    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.heads = config.heads
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)
        shape = (2, 1, config.heads, config.width // config.heads)
        self.qk_bias = nn.Parameter(torch.zeros(shape)) if config.qk_bias else None

    def forward(self, x: Tensor, angles: Tensor, slot: Slot | None) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.Wqkv(x).view(batch, time, 3, self.heads, -1).unbind(2)
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if slot is not None:
            if slot:
                k, v = torch.cat([slot["k"], k], dim=2), torch.cat([slot["v"], v], dim=2)
            slot |= {"k": k, "v": v}
        y = F.scaled_dot_product_attention(q, k, v, is_causal=time > 1)
        return self.proj(y.transpose(1, 2).reshape(batch, time, width))


class GatedMLP(nn.Module):
    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.fc = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (Norm(config) for _ in range(4))
        self.attn, self.mlp = SelfAttention(config), GatedMLP(config)

    def forward(self, x: Tensor, angles: Tensor, slot: Slot | None = None) -> Tensor:
        x = self.norm_2(self.attn(self.norm_1(x), angles, slot) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


class Huginn(nn.Module):
    """The looped decoder; `forward` gives logits (b t vocab) for tokens (b t)."""

    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.config = config

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config) for _ in range(count))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.width),
                "prelude": blocks(config.prelude_layers),
                "adapter": nn.Linear(2 * config.width, config.width, bias=config.adapter_bias),
                "core_block": blocks(config.core_layers),
                "coda": blocks(config.coda_layers),
                "ln_f": Norm(config),
            }
        )
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(
        self,
        tokens: Tensor,
        latent: Tensor,
        ungraded: int,
        graded: int,
        slots: Mapping[int, Slot] | None = None,
        start: int = 0,
    ) -> Tensor:
        """`ungraded` loops without a gradient, then `graded` ones with it, from latent (b t d).

        `slots` hold the `start` tokens before these, by execution of a block, and take these in.
        """
        parts, config = self.transformer, self.config
        end = start + tokens.shape[1]
        angles = rotation(end, config.width // config.heads, config.rotary_base)[start:]
        execution = itertools.count()

        def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            for block in blocks:
                number = next(execution)
                x = block(x, angles, None if slots is None else slots[number])
            return x

        embedded = run(parts["prelude"], parts["wte"](tokens) * config.width**0.5)
        s = latent

        def loop(s: Tensor) -> Tensor:
            return run(parts["core_block"], parts["adapter"](torch.cat([s, embedded], dim=-1)))

        with torch.no_grad():
            for _ in range(ungraded):
                s = loop(s)
        for _ in range(graded):
            s = loop(s)
        return self.lm_head(parts["ln_f"](run(parts["coda"], parts["ln_f"](s)))).float()

    @torch.inference_mode()
    def generate(self, tokens: Tensor, depth: int, count: int) -> Tensor:
        """The `count` most probable next tokens, one by one, (b count)."""
        slots: Mapping[int, Slot] = collections.defaultdict(dict)
        found, start = [], 0
        for _ in range(count):
            latent = torch.zeros(*tokens.shape, self.config.width)
            logits = self(tokens, latent, depth, 0, slots, start)
            start += tokens.shape[1]
            tokens = logits[:, -1:].argmax(dim=-1)
            found.append(tokens)
        return torch.cat(found, dim=1)


def load(config: HuginnConfig, tensors: Mapping[str, np.ndarray]) -> Huginn:
    """The model with the weights of a published checkpoint's names; every one of them is used."""
    model = Huginn(config)
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model
