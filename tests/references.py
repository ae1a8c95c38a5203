"""What ops, layers and models compute, as naive NumPy loops, in the dtype of their arguments.

Parameters are nested dicts with the names of the modules' attributes. x is (b t ...), reset bool
(b t).
"""

import numpy as np


def spread(mask, like):
    """A mask over the leading axes of `like`, with axes of size 1 behind."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def linear_scan(a, b, h, reset):
    out = []
    for t in range(b.shape[1]):
        h = a[:, t] * np.where(spread(reset[:, t], h), 0, h) + b[:, t]
        out.append(h)
    return np.stack(out, axis=1), h


def block_scan(a, b, h, reset):
    out = []
    for t in range(b.shape[1]):
        entering = np.where(spread(reset[:, t], h), 0, h)
        h = np.einsum("bij...,bj...->bi...", a[:, t], entering) + b[:, t]
        out.append(h)
    return np.stack(out, axis=1), h


def elman(matrices, x, h, reset):
    """Matrices (m m n), x (b t m n)."""
    out = []
    for t in range(x.shape[1]):
        h = np.where(spread(reset[:, t], h), 0, h)
        h = np.tanh(x[:, t] + np.einsum("ijn,bjn->bin", matrices, h))
        out.append(h)
    return np.stack(out, axis=1), h


def running_max(log_decay, x, m, reset):
    out = []
    for t in range(x.shape[1]):
        m = np.where(spread(reset[:, t], m), -np.inf, m)
        m = np.maximum(log_decay[:, t] + m, x[:, t])
        out.append(m)
    return np.stack(out, axis=1), m


def selective_scan(x, dt, a, b, c, h, reset):
    out = []
    for t in range(x.shape[1]):
        h = np.where(spread(reset[:, t], h), 0, h)
        entering = (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        h = np.exp(dt[:, t, :, None] * a) * h + entering
        out.append(np.sum(h * c[:, t, None], axis=-1))
    return np.stack(out, axis=1), h


def matrix_scan(q, k, v, g, beta, state, reset, epsilon=None):
    """beta None: the gated rule. g is (b t h 1) or (b t h k)."""
    if epsilon is not None:
        v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    out = []
    for t in range(q.shape[1]):
        state = np.exp(g[:, t])[..., None] * np.where(spread(reset[:, t], state), 0, state)
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t][..., None] * new[..., None, :]
        out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    y = np.stack(out, axis=1)
    return y if epsilon is None else y[..., :-1] / (y[..., -1:] + epsilon), state


def dag_scan(q, k, v, s, t, m, d, tails, heads, origins, targets):
    """One graph whose edges come in an order that they can be computed in: q (nodes h k), s (edges
    h), t (pairs h).
    """
    states = []
    out = d[..., None] * np.sum(q * k, axis=-1, keepdims=True) * v
    for edge, (tail, head) in enumerate(zip(tails, heads, strict=True)):
        state = s[edge, :, None, None] * k[tail][..., None] * v[tail][..., None, :]
        for pair in np.flatnonzero(targets == edge):
            state = state + t[pair, :, None, None] * states[origins[pair]]
        states.append(state)
        out[head] += m[edge, :, None] * np.einsum("hkv,hk->hv", state, q[head])
    return out


def mark_scan(q, k, v, source, transition, mark, direct, state, reset):
    """All with the axes j*; the state is (b h k v jt)."""
    out = []
    for t in range(q.shape[1]):
        state = np.where(spread(reset[:, t], state), 0, state)
        y = np.einsum("bhoqt,bhkvt,bhkq->bhvo", mark[:, t], state, q[:, t])
        y += np.einsum("bhoqpj,bhkq,bhkp,bhvj->bhvo", direct[:, t], q[:, t], k[:, t], v[:, t])
        out.append(y / q.shape[3] ** 0.5)
        state = np.einsum("bhit,bhkvt->bhkvi", transition[:, t], state)
        state = state + np.einsum("bhtpj,bhkp,bhvj->bhkvt", source[:, t], k[:, t], v[:, t])
    return np.stack(out, axis=1), state


def grid_scan(q, k, v, gates, direct, orientation=0):
    """One orientation, all with the axes j*; gates is a dict by the names of `GridGates`."""
    flips = tuple(axis for axis in (1, 2) if orientation >> (axis - 1) & 1)
    q, k, v, direct = (np.flip(z, flips) for z in (q, k, v, direct))
    gates = {name: np.flip(z, flips) for name, z in gates.items() if z is not None}
    nothing = np.zeros_like(gates["transition_rl"])
    batch, width, height, heads, keys, _ = q.shape
    zero = np.zeros((batch, heads, keys, v.shape[4], nothing.shape[-1]), q.dtype)
    right, down = {}, {}
    y = np.zeros((*v.shape[:5], direct.shape[4]), q.dtype)
    for i in range(width):
        for j in range(height):
            at = np.s_[:, i, j]
            left, up = right.get((i - 1, j), zero), down.get((i, j - 1), zero)

            def passed(name, state, at=at):
                return np.einsum("bhit,bhkvt->bhkvi", gates.get(name, nothing)[at], state)

            def written(name, at=at):
                return np.einsum("bhtpj,bhkp,bhvj->bhkvt", gates[name][at], k[at], v[at])

            def marked(name, state, at=at):
                return np.einsum("bhoqt,bhkvt,bhkq->bhvo", gates[name][at], state, q[at])

            right[i, j] = passed("transition_rl", left) + passed("transition_ru", up)
            right[i, j] += written("source_r")
            down[i, j] = passed("transition_du", up) + passed("transition_dl", left)
            down[i, j] += written("source_d")
            y[at] = marked("mark_l", left) + marked("mark_u", up)
            y[at] += np.einsum("bhoqpj,bhkq,bhkp,bhvj->bhvo", direct[at], q[at], k[at], v[at])
    return np.flip(y / keys**0.5, flips)


def wkv(k, v, rate, bonus, a, b, reset):
    out = []
    for t in range(k.shape[1]):
        a, b = (np.where(reset[:, t, None], 0, z) for z in (a, b))
        now = np.exp(bonus + k[:, t])
        out.append((a + now * v[:, t]) / (b + now))
        a = np.exp(-rate) * a + np.exp(k[:, t]) * v[:, t]
        b = np.exp(-rate) * b + np.exp(k[:, t])
    return np.stack(out, axis=1), a, b


def mlstm(q, k, v, input_gate, log_forget, memory, normaliser, m, reset, eps):
    out = []
    for t in range(q.shape[1]):
        memory, normaliser, m = (
            np.where(spread(reset[:, t], z), 0, z) for z in (memory, normaliser, m)
        )
        before, m = m, np.maximum(log_forget[:, t] + m, input_gate[:, t])
        forget, enter = np.exp(log_forget[:, t] + before - m), np.exp(input_gate[:, t] - m)
        key = enter[..., None] * k[:, t]
        memory = forget[..., None, None] * memory + key[..., None] * v[:, t, :, None]
        normaliser = forget[..., None] * normaliser + key
        query = q[:, t] / q.shape[-1] ** 0.5
        length = np.maximum(np.abs(np.sum(normaliser * query, axis=-1)), np.exp(-m)) + eps
        out.append(np.sum(memory * query[..., None], axis=-2) / length[..., None])
    return np.stack(out, axis=1), memory, normaliser, m


def slstm(x, recurrent, h, c, n, reset):
    out = []
    for t in range(x.shape[1]):
        h, c, n = (np.where(spread(reset[:, t], s), 0, s) for s in (h, c, n))
        z, i, f, o = np.moveaxis(x[:, t] + np.einsum("bhn,ghnm->bghm", h, recurrent), 1, 0)
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        out.append(h)
    return np.stack(out, axis=1), h, c, n


def causal_conv(x, kernel, bias, window, reset):
    out = []
    for t in range(x.shape[1]):
        window = np.where(reset[:, t, None, None], 0, window)
        window = np.concatenate([window, x[:, t, None]], axis=1)
        out.append(bias + sum(kernel[j] * window[:, j] for j in range(kernel.shape[0])))
        window = window[:, 1:]
    return np.stack(out, axis=1), window


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    """The tanh form, which is what the published models and `jax.nn.gelu` use."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softplus(x):
    return np.log1p(np.exp(x))


def linear(params, x):
    kernel = params["kernel"]
    y = np.tensordot(x, kernel, axes=1)
    return y + params["bias"] if "bias" in params else y


def block_linear(params, x):
    kernel, width = params["kernel"], params["kernel"].shape[1]
    y = [x[..., i * width : (i + 1) * width] @ kernel[i] for i in range(kernel.shape[0])]
    return np.concatenate(y, axis=-1) + params["bias"].reshape(-1)


def gated_mlp(params, x, activation=silu):
    return linear(params["out"], activation(linear(params["gate"], x)) * linear(params["up"], x))


def rms_norm(params, x, epsilon=1e-6, unit_offset=False):
    scale = params["scale"] + 1 if unit_offset else params["scale"]
    y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale
    return y + params["bias"] if "bias" in params else y


def layer_norm(params, x, epsilon=1e-5, groups=1):
    parts = []
    for part in np.split(x, groups, axis=-1):
        centred = part - np.mean(part, axis=-1, keepdims=True)
        parts.append(centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon))
    y = np.concatenate(parts, axis=-1) * params["scale"]
    return y + params["bias"] if "bias" in params else y


def rotate(x, position, base, pairing):
    """x (h k) at one position; each pair is a complex number, turned by its angle."""
    width = x.shape[-1]
    angle = position * base ** (-2 * np.arange(width // 2) / width)
    turn = np.exp(1j * angle).astype(np.result_type(x.dtype, np.complex64))
    if pairing == "interleaved":
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    turned = (x[:, : width // 2] + 1j * x[:, width // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


def attend(q, k, v, sees):
    """q (b t h k), k and v (b s g k), sees bool (b t s): one query, one head at a time."""
    y = np.zeros_like(q)
    share = q.shape[2] // k.shape[2]
    for b, t in np.ndindex(q.shape[:2]):
        seen_k, seen_v = k[b, sees[b, t]], v[b, sees[b, t]]
        for h in range(q.shape[2]):
            scores = seen_k[:, h // share] @ q[b, t, h] / q.shape[-1] ** 0.5
            y[b, t, h] = softmax(scores) @ seen_v[:, h // share]
    return y


def visible(reset, window=None):
    """bool (b t s): s is not later than t, and no reset lies after s up to t; s is one of the last
    `window` steps."""
    segment = np.cumsum(reset, axis=1)
    seen = np.tril(segment[:, :, None] == segment[:, None, :])
    return seen if window is None else seen & ~np.tril(np.ones_like(seen[0]), -window)


def attention(params, x, reset, base, pairing, window=None, rotary_width=None):
    q, kv = linear(params["query"], x), linear(params["key_value"], x)
    k, v = kv[:, :, 0], kv[:, :, 1]
    if "query_bias" in params:
        q, k = q + params["query_bias"], k + params["key_bias"]
    q, k = q.copy(), k.copy()
    for b in range(x.shape[0]):
        position = 0
        for t in range(x.shape[1]):
            position = 0 if reset[b, t] else position
            for z in (q, k):
                turned = z[b, t, :, :rotary_width]
                z[b, t, :, :rotary_width] = rotate(turned, position, base, pairing)
            position += 1
    y = attend(q, k, v, visible(reset, window))
    return linear(params["out"], y.reshape(*x.shape[:2], -1))


def rglru(params, x, h, reset):
    r = sigmoid(block_linear(params["recurrence_gate"], x))
    i = sigmoid(block_linear(params["input_gate"], x))
    a = np.exp(-8 * r * softplus(params["decay"]))
    scale = np.where(reset[..., None], 1, np.sqrt(1 - a**2))
    return linear_scan(a, scale * i * x, h, reset)


def recurrent_block(params, x, window, h, reset):
    inner, window = causal_conv(
        linear(params["input"], x), params["conv_kernel"], params["conv_bias"], window, reset
    )
    inner, h = rglru(params["recurrence"], inner, h, reset)
    return linear(params["out"], gelu(linear(params["gate"], x)) * inner), window, h


def linear_attention(params, x, hidden, windows, position, reset, options):
    q, k, v = (linear(params[name], x) for name in ("query", "key", "value"))
    if windows:
        qkv = []
        windows = list(windows)
        for i, (name, z) in enumerate((("query", q), ("key", k), ("value", v))):
            kernel = params[f"{name}_conv"]["kernel"]
            kernel = kernel.reshape(kernel.shape[0], -1)
            flat, zero = z.reshape(*z.shape[:2], -1), np.zeros_like(kernel[0])
            y, windows[i] = causal_conv(flat, kernel, zero, windows[i], reset)
            qkv.append(silu(y).reshape(z.shape))
        q, k, v = qkv
    position = position.copy()
    for t in range(x.shape[1]):
        position = np.where(reset[:, t], 0, position)
        if options.rotary_base is not None:
            for b in range(x.shape[0]):
                for z in (q, k):
                    z[b, t] = rotate(z[b, t], position[b], options.rotary_base, "half")
        position = position + 1
    beta = None
    if options.rule == "delta":
        q, k = (z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6) for z in (q, k))
        beta = options.beta_scale * sigmoid(linear(params["write"], x))
    g = log_decay(params, x, q.shape[2], options.gate)
    g = g.reshape(*q.shape[:3], -1)
    y, hidden = matrix_scan(q / q.shape[-1] ** 0.5, k, v, g, beta, hidden, reset)
    y = rms_norm(params["read_norm"], y)
    if "output_gate" in params:
        y = y * silu(linear(params["output_gate"], x))
    y = linear(params["out"], y.reshape(*x.shape[:2], -1))
    return y, hidden, tuple(windows), position.astype(np.int32)


def log_decay(params, x, heads, gate):
    if gate == "none":
        return np.zeros((*x.shape[:2], heads), x.dtype)
    if gate == "constant":
        decay = np.log(1 - 2.0 ** (-5 - np.arange(heads))).astype(x.dtype)
        return np.broadcast_to(decay, (*x.shape[:2], heads))
    params = params["decay_gate"]
    raw = linear(params["up"], linear(params["down"], x) if "down" in params else x)
    if gate == "logistic":
        return np.log(sigmoid(raw)) / 16
    return -np.exp(params["log_rate"]).reshape((-1,) + (1,) * (raw.ndim - 3)) * softplus(raw)


def linear_attention_lm(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens] * config.width**0.5
    batch, heads = tokens.shape[0], config.heads
    widths = config.key_width, config.key_width, config.value_width
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        windows = [
            np.zeros((batch, config.conv_width - 1, heads * width), x.dtype) for width in widths
        ]
        hidden = np.zeros((batch, heads, config.key_width, config.value_width), x.dtype)
        position = np.zeros(batch, np.int32)
        normed = rms_norm(block["mixer_norm"], x)
        y, *_ = linear_attention(block["mixer"], normed, hidden, windows, position, reset, config)
        x = x + y
        x = x + gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x))
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return rms_norm(params["norm"], x) @ head["table"].T


def mamba_mixer(params, x, window, h, reset, activation=silu):
    both = linear(params["input"], x)
    bias = params.get("conv_bias", np.zeros_like(both[0, 0, 0]))
    u, window = causal_conv(both[:, :, 0], params["conv_kernel"], bias, window, reset)
    u = activation(u)
    n = params["log_rate"].shape[1]
    select = linear(params["select"], u)
    low, b, c = np.split(select, [select.shape[-1] - 2 * n, select.shape[-1] - n], axis=-1)
    dt = softplus(linear(params["step"], low))
    y, h = selective_scan(u, dt, -np.exp(params["log_rate"]), b, c, h, reset)
    y = (y + params["skip"] * u) * silu(both[:, :, 1])
    return linear(params["out"], y), window, h


def mamba(params, tokens, reset, config, activation=silu):
    x = params["embedding"]["table"][tokens]
    batch, inner = tokens.shape[0], config.inner_width
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        window = np.zeros((batch, config.conv_width - 1, inner), x.dtype)
        h = np.zeros((batch, inner, config.state_size), x.dtype)
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon)
        x = x + mamba_mixer(block["mixer"], normed, window, h, reset, activation)[0]
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return rms_norm(params["norm"], x, config.norm_epsilon) @ head["table"].T


def token_shift(x, before, reset):
    out = []
    for t in range(x.shape[1]):
        out.append(np.where(reset[:, t, None], 0, before))
        before = x[:, t]
    return np.stack(out, axis=1)


def rwkv_time_mixing(params, x, before, reset):
    def mixed(name):
        mu = params[f"mix_{name}"]
        return linear(params[name], mu * x + (1 - mu) * token_shift(x, before, reset))

    k, v, r = mixed("key"), mixed("value"), sigmoid(mixed("receptance"))
    nothing = np.zeros_like(k[:, 0])
    rate = np.exp(params["log_rate"])
    y, _, _ = wkv(k, v, rate, params["bonus"], nothing, nothing, reset)
    return linear(params["out"], r * y)


def rwkv_channel_mixing(params, x, before, reset):
    def mixed(name):
        mu = params[f"mix_{name}"]
        return linear(params[name], mu * x + (1 - mu) * token_shift(x, before, reset))

    return sigmoid(mixed("receptance")) * linear(params["value"], np.maximum(mixed("key"), 0) ** 2)


def rwkv_block(params, x, time, channels, reset, epsilon=1e-5):
    normed = layer_norm(params["time_norm"], x, epsilon)
    x = x + rwkv_time_mixing(params["time"], normed, time, reset)
    normed = layer_norm(params["channels_norm"], x, epsilon)
    return x + rwkv_channel_mixing(params["channels"], normed, channels, reset)


def rwkv(params, tokens, reset, config):
    x = layer_norm(
        params["embedding_norm"], params["embedding"]["table"][tokens], config.norm_epsilon
    )
    for i in range(config.layers):
        nothing = np.zeros_like(x[:, 0])
        block = layer(params["blocks"], i)
        if config.rescale_every:
            for mixing, name in (("time", "out"), ("channels", "value")):
                kernel = block[mixing][name]["kernel"] / 2 ** (i // config.rescale_every)
                block[mixing] = block[mixing] | {name: {"kernel": kernel}}
        x = rwkv_block(block, x, nothing, nothing, reset, config.norm_epsilon)
        if config.rescale_every and (i + 1) % config.rescale_every == 0:
            x = x / 2
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return layer_norm(params["norm"], x) @ head["table"].T


def para_cell(params, x, state, reset, limit=np.inf):
    """The LSTM's if there are peepholes; its state is (b 2 d), c before h."""
    heads, fan_in, _, size = params["kernel"].shape
    a = np.clip(params["recurrent"], -limit, limit)
    out = []
    for t in range(x.shape[1]):
        state = np.where(spread(reset[:, t], state), 0, state)
        u = [
            x[:, t, i * fan_in : (i + 1) * fan_in] @ params["kernel"][i].reshape(fan_in, -1)
            for i in range(heads)
        ]
        u = np.concatenate([part.reshape(-1, 3, size) for part in u], axis=-1) + params["bias"]
        if "peephole" in params:
            p = np.clip(params["peephole"], -limit, limit)
            c, h = state[:, 0], state[:, 1]
            f = sigmoid(a[0] * h + p[0] * c + u[:, 0])
            c = f * c + (1 - f) * np.tanh(a[2] * h + u[:, 2])
            h = sigmoid(a[1] * h + p[1] * c + u[:, 1]) * np.tanh(c)
            state = np.stack([c, h], axis=1)
        else:
            z, r = (sigmoid(a[i] * state + u[:, i]) for i in range(2))
            h = state = (1 - z) * state + z * np.tanh(a[2] * state * r + u[:, 2])
        out.append(h)
    return np.stack(out, axis=1), state


def classical_cell(params, x, state, reset):
    """Elman's, the GRU or the LSTM, by the parameters that there are."""
    out = []
    for t in range(x.shape[1]):
        state = np.where(spread(reset[:, t], state), 0, state)
        h = state[:, 1] if "peephole" in params else state
        u, mixed = linear(params["input"], x[:, t]), np.tensordot(h, params["recurrent"], axes=1)
        if "peephole" in params:
            p, c, gates = params["peephole"], state[:, 0], u + mixed
            i, f = (sigmoid(gates[:, k] + p[k] * c) for k in range(2))
            c = f * c + i * np.tanh(gates[:, 3])
            h = sigmoid(gates[:, 2] + p[2] * c) * np.tanh(c)
            state = np.stack([c, h], axis=1)
        elif "candidate_bias" in params:
            r, z = (sigmoid(u[:, k] + mixed[:, k]) for k in range(2))
            n = np.tanh(u[:, 2] + r * (mixed[:, 2] + params["candidate_bias"]))
            h = state = (1 - z) * n + z * h
        else:
            h = state = np.tanh(u[:, 0] + mixed[:, 0])
        out.append(h)
    return np.stack(out, axis=1), state


def pararnn(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens]
    batch, width = tokens.shape[0], config.width
    limit = np.inf if config.recurrent_limit is None else config.recurrent_limit
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        inputs = linear(block["input"], rms_norm(block["norm"], x, config.norm_epsilon))
        inner, gate = inputs[:, :, 0], inputs[:, :, 1]
        window = np.zeros((batch, config.conv_width - 1, width), x.dtype)
        inner, _ = causal_conv(inner, block["conv_kernel"], block["conv_bias"], window, reset)
        state = np.zeros((batch, width) if config.cell == "gru" else (batch, 2, width), x.dtype)
        h, _ = para_cell(block["cell"], silu(inner), state, reset, limit)
        h = rms_norm(block["gate_norm"], h, config.norm_epsilon) * silu(gate)
        x = block["residual_scale"] * x + linear(block["out"], h)
        mixed = gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x, config.norm_epsilon))
        x = x + mixed if config.mlp_residual else mixed
    x = rms_norm(params["norm"], x, config.norm_epsilon)
    return x @ params["embedding"]["table"].T


def rnn(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens]
    batch, width = tokens.shape[0], config.width
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon)
        if config.cell == "slstm":
            mixer, start = block["mixer"], np.zeros((3, batch, config.heads, width // config.heads))
            h, *_ = slstm(linear(mixer["input"], normed), mixer["recurrent"], *start, reset)
            h = h.reshape(x.shape)
        else:
            state = np.zeros(
                (batch, 2, width) if config.cell == "lstm" else (batch, width), x.dtype
            )
            h, _ = classical_cell(block["mixer"], normed, state, reset)
        x = x + h
        x = x + gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x, config.norm_epsilon))
    return rms_norm(params["norm"], x, config.norm_epsilon) @ params["embedding"]["table"].T


def mamba2_mixer(params, x, window, h, reset, config, activation=silu):
    heads, width = config.heads, config.head_width
    inner, shared = heads * width, config.groups * config.state_size
    joint = linear(params["input"], x)
    gate, u, step = np.split(joint, [inner, joint.shape[-1] - heads], axis=-1)
    bias = params.get("conv_bias", np.zeros_like(u[0, 0]))
    u, window = causal_conv(u, params["conv_kernel"], bias, window, reset)
    u, b, c = np.split(activation(u), [inner, inner + shared], axis=-1)
    u = u.reshape(*u.shape[:2], heads, width)
    b, c = (
        np.repeat(x.reshape(*x.shape[:2], config.groups, -1), heads // config.groups, axis=2)
        for x in (b, c)
    )
    low, high = (np.asarray(limit, x.dtype) for limit in config.step_limit)
    dt = np.clip(softplus(step + params["step_bias"]), low, high)
    log_decay = -dt * np.exp(params["log_rate"])
    y, h = matrix_scan(c, b, dt[..., None] * u, log_decay[..., None], None, h, reset)
    y = (y + params["skip"][:, None] * u).reshape(gate.shape) * silu(gate)
    parts = y.reshape(*y.shape[:2], config.groups, -1)
    ones = {"scale": np.ones(parts.shape[-1], x.dtype)}
    y = rms_norm(ones, parts, config.norm_epsilon).reshape(y.shape) * params["norm"]["scale"]
    return linear(params["out"], y), window, h


def mamba2(params, tokens, reset, config, activation=silu):
    x = params["embedding"]["table"][tokens]
    batch, mixed = tokens.shape[0], config.inner_width + 2 * config.groups * config.state_size
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        window = np.zeros((batch, config.conv_width - 1, mixed), x.dtype)
        h = np.zeros((batch, config.heads, config.state_size, config.head_width), x.dtype)
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon)
        x = x + mamba2_mixer(block["mixer"], normed, window, h, reset, config, activation)[0]
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return rms_norm(params["norm"], x, config.norm_epsilon) @ head["table"].T


def gated_conv(params, x, window, reset):
    inner, window = causal_conv(
        linear(params["input"], x), params["conv_kernel"], params["conv_bias"], window, reset
    )
    return linear(params["out"], silu(linear(params["gate"], x)) * inner), window


def taylor(x):
    width = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    parts = [np.ones_like(x[..., :1]), x / width**0.25, squares / (2 * width) ** 0.5]
    return np.concatenate(parts, axis=-1).astype(x.dtype)


def taylor_attention(params, x, state, reset, epsilon):
    def heads(name):
        kernel = params[name]["kernel"]
        return np.einsum("btd,dhk->bthk", x, kernel)

    zero = np.zeros((*x.shape[:2], 1, 1), x.dtype)
    q, k, v = taylor(heads("query")), taylor(heads("key")), heads("value")
    y, state = matrix_scan(q, k, v, zero, None, state, reset, epsilon)
    return linear(params["out"], y.reshape(x.shape)), state


def soft_cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def log_sigmoid(x):
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def mlstm_mixer(params, x, memory, normaliser, m, reset, cap=15.0, norm_epsilon=1e-6, eps=1e-6):
    q, k, v = (linear(params[name], x) for name in ("query", "key", "value"))
    i, f = (soft_cap(linear(params[name], x), cap) for name in ("input_gate", "forget_gate"))
    y, *state = mlstm(q, k, v, i, log_sigmoid(f), memory, normaliser, m, reset, eps)
    y = layer_norm(params["norm"], y.reshape(*y.shape[:2], -1), norm_epsilon, q.shape[2])
    return linear(params["out"], sigmoid(linear(params["output_gate"], x)) * y), *state


def xlstm(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens]
    heads = tokens.shape[0], config.heads
    keys, values = config.key_width // config.heads, config.value_width // config.heads
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        state = (
            np.zeros((*heads, keys, values), x.dtype),
            np.zeros((*heads, keys), x.dtype),
            np.zeros(heads, x.dtype),
        )
        options = config.gate_soft_cap, config.norm_epsilon, config.epsilon
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon)
        x = x + mlstm_mixer(block["mixer"], normed, *state, reset, *options)[0]
        x = x + gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x, config.norm_epsilon))
    x = rms_norm(params["norm"], x, config.norm_epsilon)
    return soft_cap(x @ params["head"]["table"].T, config.logits_soft_cap)


def head_map(params, x, reads=True):
    """(... h sizes); head g*s + p reads part p of s."""
    bias = params["bias"]
    if "weight" not in params or not reads:
        return np.broadcast_to(bias, x.shape[:-1] + bias.shape)
    weight = params["weight"]
    parts = np.split(x, weight.shape[1], axis=-1)
    heads = [
        np.tensordot(parts[p], weight[g, p], axes=(-1, -1))
        for g in range(weight.shape[0])
        for p in range(weight.shape[1])
    ]
    return np.stack(heads, axis=x.ndim - 1) + bias


def gate(params, x):
    return sigmoid(head_map(params["map"], x))


def transition(params, x, factor=5.0, order=16):
    """With tanh and the exponential."""
    values = np.tanh(factor * head_map(params["eigenvalues"], x))
    if values.shape[-1] == 1:
        return values[..., None]

    def orthogonal(name):
        z = head_map(params[name], x)
        skew = z - np.swapaxes(z, -1, -2)
        term = np.broadcast_to(np.eye(z.shape[-1], dtype=z.dtype), z.shape)
        total = term
        for i in range(1, order):
            term = skew @ term / z.dtype.type(i)
            total = total + term
        return total

    return orthogonal("out") @ (values[..., None] * orthogonal("into"))


def projection(params, x, heads):
    """(... h k j); with more parts than heads, several make one head's channels."""
    weight, bias = params["weight"], params["bias"]
    parts = np.split(x, weight.shape[3], axis=-1)
    made = [
        np.tensordot(parts[p], weight[g, :, :, p], axes=(-1, -1))
        for g in range(weight.shape[0])
        for p in range(weight.shape[3])
    ]
    flat = np.concatenate(made, axis=x.ndim - 1)
    return flat.reshape(*x.shape[:-1], heads, -1, flat.shape[-1]) + bias


def plstm_read(params, x, conv, config):
    """q, k, v, D of the shared part."""
    heads = config.heads
    inputs = config.conv_inputs
    read = [
        projection(params[name], conv if letter in inputs else x, heads)
        for name, letter in (("query", "Q"), ("key", "K"), ("value", "V"))
    ]
    return *read, gate(params["direct"], conv if "D" in inputs else x)


def plstm_tail(params, y, skipped, config):
    """Norm of each head, output projection, skip."""
    grouped = y.reshape(*y.shape[:-3], config.heads, -1)
    scale = params["norm"]["scale"].reshape(config.heads, -1)
    y = rms_norm({"scale": scale}, grouped, config.norm_epsilon).reshape(*y.shape[:-3], -1)
    y = linear(params["out"], y) if "out" in params else y
    return y + params["skip"] * skipped if "skip" in params else y


def plstm(params, x, window, memory, reset, config):
    conv, window = causal_conv(x, params["conv"]["kernel"], params["conv"]["bias"], window, reset)
    q, k, v, direct = plstm_read(params["shared"], x, conv, config)
    gates = (
        gate(params["source"], conv),
        transition(params["transition"], conv),
        gate(params["mark"], conv),
    )
    y, memory = mark_scan(q, k, v, *gates, direct, memory, reset)
    return plstm_tail(params["shared"], y, conv, config), window, memory


def plstm_lm(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens]
    mixer, epsilon = config.block.mixer, config.norm.epsilon
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        window = np.zeros((len(x), mixer.conv_width - 1, mixer.width), x.dtype)
        sizes = mixer.heads, mixer.key_width, mixer.value_width, mixer.jt
        memory = np.zeros((len(x), *sizes), x.dtype)
        up = linear(block["up"], rms_norm(block["norm"], x, epsilon))
        y, *_ = plstm(block["mixer"], up[..., 0, :], window, memory, reset, mixer)
        x = x + linear(block["down"], y * silu(up[..., 1, :]))
    x = rms_norm(params["norm"], x, epsilon)
    return soft_cap(x @ params["head"]["table"].T, config.logits_soft_cap)


def plstm_grid(params, x, config):
    """Fused, without a convolution, mode P; the heads' orientations are in a row."""
    q, k, v, direct = plstm_read(params["shared"], x, x, config)
    bias = params["angle"]["bias"]
    read = head_map(params["angle"], x) - bias
    angle = sigmoid(bias + x.dtype.type(config.angle_scale / config.width) * read)[..., None, None]
    source = angle[..., None] * gate(params["source_r"], x)
    turned = angle * transition(params["transition_r"], x)
    mark = gate(params["mark_l"], x)
    gates = {
        "source_r": source,
        "source_d": 1 - source,
        "transition_rl": turned,
        "transition_du": 1 - turned,
        "transition_dl": 1 - turned,
        "transition_ru": turned,
        "mark_l": mark,
        "mark_u": mark,
    }
    y = 0
    for o in range(4):
        of_one = {name: z[:, :, :, o::4] for name, z in gates.items()}
        y = y + grid_scan(q, k, v, of_one, direct * x.dtype.type(o == 0), o)
    return plstm_tail(params["shared"], y, x, config)


def layer(stacked, i):
    """The parameters of the i-th of several stacked layers."""
    return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in stacked.items()}


def linear_rnn(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens] * config.width**0.5
    batch, width = tokens.shape[0], config.recurrent_width
    for i in range(config.layers):
        block = layer(params["blocks"], i)
        window = np.zeros((batch, config.conv_width - 1, width), x.dtype)
        h = np.zeros((batch, width), x.dtype)
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon, unit_offset=True)
        x = x + recurrent_block(block["mixer"], normed, window, h, reset)[0]
        normed = rms_norm(block["mlp_norm"], x, config.norm_epsilon, unit_offset=True)
        x = x + gated_mlp(block["mlp"], normed, gelu)
    x = rms_norm(params["norm"], x, config.norm_epsilon, unit_offset=True)
    logits = x @ params["embedding"]["table"].T
    return config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)


def recurrentgemma(params, tokens, reset, config):
    x = params["embedding"]["table"][tokens] * config.embedding_scale
    batch, width, period = tokens.shape[0], config.recurrent_width, len(config.pattern)
    for i in range(config.layers):
        group, place = divmod(i, period)
        if (group + 1) * period <= config.layers:
            block = layer(params["groups"]["blocks"][place], group)
        else:
            block = params["tail"]["blocks"][place]
        normed = rms_norm(block["mixer_norm"], x, config.norm_epsilon, unit_offset=True)
        if config.pattern[place] == "recurrent":
            window = np.zeros((batch, config.conv_width - 1, width), x.dtype)
            h = np.zeros((batch, width), x.dtype)
            x = x + recurrent_block(block["mixer"], normed, window, h, reset)[0]
        else:
            local = config.window, config.rotary_width
            x = x + attention(block["mixer"], normed, reset, config.rotary_base, "half", *local)
        normed = rms_norm(block["mlp_norm"], x, config.norm_epsilon, unit_offset=True)
        x = x + gated_mlp(block["mlp"], normed, gelu)
    x = rms_norm(params["norm"], x, config.norm_epsilon, unit_offset=True)
    logits = x @ params["embedding"]["table"].T
    return config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)


def sandwich_block(params, x, reset, config):
    def norm(name, x):
        return rms_norm(params[name], x, config.norm_epsilon)

    normed = norm("attention_norm", x)
    y = attention(params["attention"], normed, reset, config.rotary_base, "interleaved")
    x = norm("attention_out_norm", y + x)
    return norm("mlp_out_norm", gated_mlp(params["mlp"], norm("mlp_norm", x)) + x)


def huginn(params, tokens, latent, reset, config, depth):
    e = params["embedding"]["table"][tokens] * config.width**0.5
    for i in range(config.prelude_layers):
        e = sandwich_block(layer(params["prelude"], i), e, reset, config)
    for _ in range(depth):
        latent = linear(params["adapter_latent"], latent) + linear(params["adapter_input"], e)
        for i in range(config.core_layers):
            latent = sandwich_block(layer(params["core"], i), latent, reset, config)
    x = rms_norm(params["norm"], latent, config.norm_epsilon)
    for i in range(config.coda_layers):
        x = sandwich_block(layer(params["coda"], i), x, reset, config)
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return rms_norm(params["norm"], x, config.norm_epsilon) @ head["table"].T


def sinusoid(position, width, dtype):
    """(d) of one position; the angle is a product in this precision, which is most of its error."""
    half = width // 2
    frequency = 10000.0 ** (-np.arange(half) / max(half - 1, 1))
    angle = dtype.type(position) * frequency.astype(dtype)
    return np.concatenate([np.sin(angle), np.cos(angle), np.zeros(width % 2, dtype)])


def separable_conv(params, x, reset):
    for kernel, after in ("first_kernel", "up"), ("second_kernel", "out"):
        taps, channels = params[kernel].shape
        window = np.zeros((x.shape[0], taps - 1, channels), x.dtype)
        x, _ = causal_conv(x, params[kernel], np.zeros(channels, x.dtype), window, reset)
        x = linear(params[after], x)
        x = np.maximum(x, 0) if after == "up" else x
    return x


def universal_layer(params, x, reset, config):
    def add(name, sublayer, x):
        norm = params[f"{name}_norm"]
        if config.order == "post":
            return layer_norm(norm, x + sublayer(params[name], x), config.norm_epsilon)
        return x + sublayer(params[name], layer_norm(norm, x, config.norm_epsilon))

    def mix(params, x):
        q, kv = linear(params["query"], x), linear(params["key_value"], x)
        y = attend(q, kv[:, :, 0], kv[:, :, 1], visible(reset))
        return linear(params["out"], y.reshape(*x.shape[:2], -1))

    def transition(params, x):
        if config.transition == "conv":
            return separable_conv(params, x, reset)
        return linear(params["out"], np.maximum(linear(params["up"], x), 0))

    return add("transition", transition, add("attention", mix, x))


def positions(reset):
    """How far each step is behind the last reset, (b t)."""
    found = np.zeros(reset.shape, int)
    for b, t in np.ndindex(reset.shape):
        found[b, t] = 0 if t == 0 or reset[b, t] else found[b, t - 1] + 1
    return found


def universal_transformer(params, tokens, reset, config, offset=0):
    """Logits, and loops that counted plus the remainder of each position (b t)."""
    table, stack = params["embedding"]["table"], params["decoder"]
    width, dtype = config.width, table.dtype
    x = table[tokens] * dtype.type(width**0.5)
    position = positions(reset) + offset

    def fixed(shift):
        rows = [sinusoid(p + shift, width, dtype) for p in position.ravel()]
        return np.array(rows).reshape(*position.shape, width)

    def run(name, x, count):
        for i in range(count):
            x = universal_layer(layer(stack[name], i), x, reset, config)
        return x

    if config.layers_before:
        x = run("before", x + fixed(0), config.layers_before)
    out = np.zeros_like(x)
    h, remainder, updates = (np.zeros(tokens.shape, dtype) for _ in range(3))
    for t in range(config.steps):
        p_x = fixed(config.context * t // config.steps if config.start == "step" else 0)
        e = sinusoid(t, width, dtype)
        if config.step_coordinates == "learned":
            e = stack["coordinates"]["table"][t] * dtype.type(width**0.5)
        if config.join == "add":
            prepared = x + p_x + e
        else:
            wide = np.concatenate([x, p_x, np.broadcast_to(e, x.shape)], axis=-1)
            prepared = linear(stack["coordinates"]["join"], wide)
        new = run("core", prepared, config.block_layers)
        if config.halting == "none":
            x = new
            continue
        p = sigmoid(linear(stack["halt"], prepared)[..., 0])
        for at in np.ndindex(tokens.shape):
            if h[at] >= 1:
                if config.rule == "copy-halted":
                    new[at] = x[at]
                continue
            updates[at] += 1
            if h[at] + p[at] > 1 - config.halting_epsilon:
                u = remainder[at] = 1 - h[at]
                h[at] = 1
            else:
                u = p[at]
                h[at] += u
            out[at] = u * new[at] + ((1 - u) if config.rule == "interpolate" else 1) * out[at]
        x = new
    x = x if config.halting == "none" else out
    x = run("after", x, config.layers_after)
    if config.order == "pre":
        x = layer_norm(stack["norm"], x, config.norm_epsilon)
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return x @ head["table"].T, updates + remainder


def bilinear(a, b, step, alpha):
    """A_bar and B_bar for each step; alpha = 0 Euler, 1/2 bilinear, 1 backward Euler."""
    identity = np.eye(b.shape[0], dtype=b.dtype)
    systems = []
    for dt in step:
        left = identity - alpha * dt * a
        right = identity + (1 - alpha) * dt * a
        systems.append((np.linalg.solve(left, right), np.linalg.solve(left, dt * b)))
    return tuple(np.stack(part) for part in zip(*systems, strict=True))


def dense_scan(a_bar, b_bar, c, u, x, reset):
    out = []
    for t in range(u.shape[1]):
        x = np.where(reset[:, t, None, None], 0, x)
        x = np.einsum("dnk,bdk->bdn", a_bar, x) + b_bar * u[:, t, :, None]
        out.append(np.einsum("dmn,bdn->bdm", c, x))
    return np.stack(out, axis=1), x


def lssl(params, u, x, reset, alpha):
    a_bar, b_bar = bilinear(
        params["transition"], params["input"], np.exp(params["log_step"]), alpha
    )
    y, x = dense_scan(a_bar, b_bar, params["output"], u, x, reset)
    return y + params["skip"] * u[..., None], x


def diagonal(eigenvalues, step, method):
    """A_bar and the factor of B."""
    z = eigenvalues * step
    if method == "zoh":
        return np.exp(z), np.expm1(z) / eigenvalues
    return (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)


def s4d(params, u, x, reset, method):
    eigenvalues = -np.exp(params["log_rate"]) + 1j * params["frequency"]
    decay, gain = diagonal(eigenvalues, np.exp(params["log_step"])[:, None], method)
    decay = np.broadcast_to(decay, (*u.shape, decay.shape[-1]))
    states, x = linear_scan(decay, gain * u[..., None], x, reset)
    c = params["output_real"] + 1j * params["output_imag"]
    return 2 * np.sum(c * states, axis=-1).real + params["skip"] * u, x


def s5(params, u, x, reset, method, conj_sym):
    real = np.minimum(params["eigenvalue_real"], -1e-4)
    eigenvalues = real + 1j * params["eigenvalue_imag"]
    decay, gain = diagonal(eigenvalues, np.exp(params["log_step"]), method)
    b = gain[:, None] * (params["input_real"] + 1j * params["input_imag"])
    decay = np.broadcast_to(decay, (*u.shape[:2], decay.shape[-1]))
    states, x = linear_scan(decay, u @ b.T, x, reset)
    c = params["output_real"] + 1j * params["output_imag"]
    return (2 if conj_sym else 1) * (states @ c.T).real + params["skip"] * u, x
