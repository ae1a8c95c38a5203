"""HRM as plain PyTorch in eager mode: what `jaxrec bench hrm` is measured against.

The equations of jaxrec/models/hrm.py and jaxrec/training/pondering.py, written the way a PyTorch
user would: fused projections, `scaled_dot_product_attention`, `silu`, `rms_norm`. Weights come from
`jaxrec.convert` under the names of the published checkpoints, so both programs compute the same
function.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxrec.models.hrm import HRMConfig


def rotation(time: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (t k) of the angles, the same for both halves of the channels."""
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.arange(time, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i of x (b h t k) with channel i + k/2."""
    left, right = x.chunk(2, dim=-1)
    return x * angles[0] + torch.cat([-right, left], dim=-1) * angles[1]


class SelfAttention(nn.Module):
    def __init__(self, config: HRMConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv_proj(x).view(batch, time, 3 * self.heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, width))


class GatedMLP(nn.Module):
    def __init__(self, config: HRMConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: HRMConfig):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), GatedMLP(config)
        self.shape, self.epsilon = (config.width,), config.norm_epsilon

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        h = F.rms_norm(h + self.self_attn(h, angles), self.shape, eps=self.epsilon)
        return F.rms_norm(h + self.mlp(h), self.shape, eps=self.epsilon)


class Level(nn.Module):
    def __init__(self, config: HRMConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(layers))

    def forward(self, h: Tensor, injected: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        h = h + injected
        for layer in self.layers:
            h = layer(h, angles)
        return h


class Table(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.zeros(rows, width))


class HRM(nn.Module):
    """The solver without vectors of puzzles, positions by rotation."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Table(config.vocab_size, config.width)
        self.H_level = Level(config, config.high_layers)
        self.L_level = Level(config, config.low_layers)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.q_head = nn.Linear(config.width, 2)
        self.register_buffer("H_init", torch.zeros(config.width))
        self.register_buffer("L_init", torch.zeros(config.width))
        angles = rotation(config.length, config.width // config.heads, config.rotary_base)
        self.angles = angles

    def forward(self, tokens: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, ...]:
        """A segment: logits (b t vocab), q (b 2), and the states behind, without a gradient."""
        config = self.config
        x = F.embedding(tokens, self.embed_tokens.embedding_weight) * config.width**0.5
        with torch.no_grad():
            for i in range(config.high_cycles):
                for j in range(config.low_cycles):
                    if (i, j) != (config.high_cycles - 1, config.low_cycles - 1):
                        low = self.L_level(low, high + x, self.angles)
                if i != config.high_cycles - 1:
                    high = self.H_level(high, low, self.angles)
        low = self.L_level(low, high + x, self.angles)
        high = self.H_level(high, low, self.angles)
        return self.lm_head(high), self.q_head(high[:, 0]), high.detach(), low.detach()


def segment(
    model: HRM, tokens: Tensor, labels: Tensor, high: Tensor, low: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a segment of rows that do not explore, summed over the batch, and the states."""
    logits, q, high, low = model(tokens, high, low)
    last = steps + 1 >= model.config.max_segments
    with torch.no_grad():
        _, after, _, _ = model(tokens, high, low)
        target = torch.sigmoid(torch.where(last, after[:, 0], after.amax(dim=-1)))
        solved = (logits.argmax(dim=-1) == labels).all(dim=-1).float()
    scores = logits.double()
    s = torch.where(scores >= 0, scores + 1, 1 / (1 - scores + 1e-30))
    chosen = torch.log(s / s.sum(dim=-1, keepdim=True)).gather(-1, labels[..., None])
    loss = -chosen.mean(dim=(1, 2)).sum()
    for logit, wanted in ((q[:, 0], solved), (q[:, 1], target)):
        loss = loss + F.binary_cross_entropy_with_logits(logit, wanted, reduction="sum") / 2
    return loss, high, low


class Atan2:
    """Adam with atan2 in place of a division, over all parameters at once."""

    def __init__(self, parameters: Iterable[Tensor], rate: float, decay: float):
        self.parameters = list(parameters)
        self.rate, self.decay, self.step_count = rate, decay, 0
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.step_count += 1
        t = self.step_count
        for p, m, v in zip(self.parameters, self.mean, self.square, strict=True):
            m.lerp_(p.grad, 1 - 0.9)
            v.lerp_(p.grad.square(), 1 - 0.95)
            p.mul_(1 - self.rate * self.decay)
            root = v.sqrt() / (1 - 0.95**t) ** 0.5
            p.add_(torch.atan2(m, root), alpha=-self.rate / (1 - 0.9**t))
            p.grad = None


def load(config: HRMConfig, tensors: Mapping[str, np.ndarray], prefix: str) -> HRM:
    """The model with the weights of a published checkpoint's names; every one of them is used."""
    model = HRM(config)
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.array(x)) for name, x in tensors.items()
    }
    model.load_state_dict(state)
    return model
