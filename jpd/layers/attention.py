"""Self-attention: projections around an `attend` function that the caller supplies.

The model does not know where keys and values live. `attend(layer, q, k, v)` takes q `[T, Hq, D]`,
k and v `[T, Hkv, D]` of all tokens in the call and returns `[T, Hq, D]`: the engine's stores
into pages, `causal_attend` sees one whole sequence (training, logits of a text).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jpd.layers.linear import Linear
from jpd.layers.norm import RMSNorm
from jpd.layers.rope import rotate

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q/k norm and biases as the config says."""

    def __init__(self, config, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.qkv = Linear(
            config.hidden_size,
            (heads + 2 * kv_heads) * size,
            bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.out = Linear(
            heads * size, config.hidden_size, bias=config.out_bias, dtype=dtype, rngs=rngs
        )
        self.q_norm = RMSNorm(size, config.rms_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_eps, dtype=dtype) if config.qk_norm else None

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> jax.Array:
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).reshape(-1, heads + 2 * kv_heads, self.size)
        q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(out.reshape(x.shape[0], -1))


def causal_attend(windows: tuple[int | None, ...]) -> Attend:
    """Attention of one whole sequence on itself; `windows[layer]` limits how far back."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        tokens, heads, size = q.shape
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        q = q.reshape(tokens, k.shape[1], -1, size)
        scores = jnp.einsum(
            "qhgd,khd->hgqk", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        seen = back >= 0
        if windows[layer] is not None:
            seen &= back < windows[layer]
        weights = jax.nn.softmax(jnp.where(seen, scores * size**-0.5, -1e30), axis=-1)
        out = jnp.einsum("hgqk,khd->qhgd", weights.astype(v.dtype), v, precision=precision)
        return out.reshape(tokens, heads, size)

    return attend
