"""Huginn as plain PyTorch in eager mode: what `jaxrec bench train` is measured against.

The equations of jaxrec/models/huginn.py, written the way a PyTorch user would: fused projections,
`scaled_dot_product_attention`, `silu`, `rms_norm`, complex multiplication for the rotation. Weights
come from `jaxrec.convert` under the names of the published checkpoints, so both programs compute
the same function.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxrec.models.huginn import HuginnConfig


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

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.Wqkv(x).view(batch, time, 3, self.heads, -1).unbind(2)
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = self.norm_2(self.attn(self.norm_1(x), angles) + x)
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

    def forward(self, tokens: Tensor, latent: Tensor, ungraded: int, graded: int) -> Tensor:
        """`ungraded` loops without a gradient, then `graded` ones with it, from latent (b t d)."""
        parts, config = self.transformer, self.config
        angles = rotation(tokens.shape[1], config.width // config.heads, config.rotary_base)
        x = parts["wte"](tokens) * config.width**0.5
        for block in parts["prelude"]:
            x = block(x, angles)
        embedded, s = x, latent

        def loop(s: Tensor) -> Tensor:
            x = parts["adapter"](torch.cat([s, embedded], dim=-1))
            for block in parts["core_block"]:
                x = block(x, angles)
            return x

        with torch.no_grad():
            for _ in range(ungraded):
                s = loop(s)
        for _ in range(graded):
            s = loop(s)
        x = parts["ln_f"](s)
        for block in parts["coda"]:
            x = block(x, angles)
        return self.lm_head(parts["ln_f"](x)).float()


def load(config: HuginnConfig, tensors: Mapping[str, np.ndarray]) -> Huginn:
    """The model with the weights of a published checkpoint's names; every one of them is used."""
    model = Huginn(config)
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model
