"""The network: a Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings).

`forward` is written once for numpy, which answers, and for jax.numpy, which trains: it is handed the one or the other.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 352
    context: int = 2048
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head(self):
        """Numbers in a head."""
        return self.width // self.heads

    def shapes(self):
        """Every weight's name in the GGUF and its shape, in the order of the file."""
        kv = self.kv_heads * self.head
        out = {"token_embd.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            for part, shape in (
                ("attn_norm", (self.width,)),
                ("attn_q", (self.width, self.width)),
                ("attn_k", (kv, self.width)),
                ("attn_v", (kv, self.width)),
                ("attn_output", (self.width, self.width)),
                ("ffn_norm", (self.width,)),
                ("ffn_gate", (self.hidden, self.width)),
                ("ffn_up", (self.hidden, self.width)),
                ("ffn_down", (self.width, self.hidden)),
            ):
                out[f"blk.{layer}.{part}.weight"] = shape
        return out | {"output_norm.weight": (self.width,)}


def random_weights(config, seed):
    """Weights to begin training with: what adds to the residual stream begins small."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        deviation = 0.8 / shape[1] ** 0.5
        if name == "token_embd.weight":
            deviation = 0.05
        elif "attn_output" in name or "ffn_down" in name:
            deviation = 0.5 / (2 * config.layers * shape[1]) ** 0.5
        weights[name] = (rng.standard_normal(shape) * deviation).astype(np.float32)
    return weights


def rope_angles(config, begin, length):
    """Cosines and sines of the positions from `begin` on, [length, head / 2] each."""
    half = config.head // 2
    frequencies = config.rope_base ** (-np.arange(half) / half)
    angles = np.arange(begin, begin + length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _norm(xp, x, weight, epsilon):
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def _rotate(xp, x, cos, sin):
    """Turns neighbours, (0, 1), (2, 3), ..., as llama.cpp does for this architecture; x is [.., length, head]."""
    even, odd = x[..., ::2], x[..., 1::2]
    return xp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1).reshape(x.shape)


def _softmax(xp, x):
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def forward(xp, config, weights, tokens, past=None):
    """States [batch, length, width] of tokens [batch, length], and the keys and values of each layer.

    `past` is what an earlier call gave back for the tokens before these.
    """
    batch, length = tokens.shape
    before = past[0][0].shape[2] if past else 0
    if before + length > config.context:
        raise ValueError(f"{before + length} tokens do not fit into a context of {config.context}")
    cos, sin = rope_angles(config, before, length)
    mask = np.triu(np.full((length, before + length), -1e9, np.float32), before + 1)
    group = config.heads // config.kv_heads
    x, now = weights["token_embd.weight"][tokens], []
    for layer in range(config.layers):

        def weight(part, layer=layer):
            return weights[f"blk.{layer}.{part}.weight"]

        h = _norm(xp, x, weight("attn_norm"), config.epsilon)

        def split(part, heads, h=h, weight=weight):
            return (h @ weight(part).T).reshape(batch, length, heads, config.head).transpose(0, 2, 1, 3)

        q = _rotate(xp, split("attn_q", config.heads), cos, sin)
        k = _rotate(xp, split("attn_k", config.kv_heads), cos, sin)
        v = split("attn_v", config.kv_heads)
        if past:
            k, v = (xp.concatenate((old, new), axis=2) for old, new in zip(past[layer], (k, v)))
        now.append((k, v))
        # Each head of keys and values serves a group of query heads, side by side.
        q = q.reshape(batch, config.kv_heads, group, length, config.head)
        scores = q @ k[:, :, None].swapaxes(-1, -2) * config.head**-0.5 + mask
        mixed = _softmax(xp, scores) @ v[:, :, None]
        mixed = mixed.reshape(batch, config.heads, length, config.head).transpose(0, 2, 1, 3)
        x = x + mixed.reshape(batch, length, config.width) @ weight("attn_output").T
        h = _norm(xp, x, weight("ffn_norm"), config.epsilon)
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + xp.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    return _norm(xp, x, weights["output_norm.weight"], config.epsilon), now


def logits(weights, states):
    """How likely each token of the vocabulary comes next, before softmax."""
    return states @ weights["token_embd.weight"].T
