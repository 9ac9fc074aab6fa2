"""Self-attention: projections around an `attend` function that the caller supplies.

The model does not know where keys and values live. `attend(layer, qkv, cos, sin, norms)` takes the
projected heads qkv `[T, Hq + 2 Hkv, D]` (of q, then k, then v) of all tokens in the call, the
angles `[T, D / 2]` that q and k are rotated by, and the norms that come before the rotation, if
any; it returns `[T, Hq, D]`. The engine's stores into pages, `causal_attend` sees one whole
sequence (training, logits of a text).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jpd import ops
from jpd.layers.linear import Linear, SummedLinear
from jpd.layers.norm import RMSNorm

Attend = Callable[[int, jax.Array, jax.Array, jax.Array, ops.HeadNorms | None], jax.Array]
Observe = Callable[[int, jax.Array, jax.Array], None]


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
        self.out = SummedLinear(
            heads * size,
            config.hidden_size,
            over="heads",
            bias=config.out_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.q_norm = RMSNorm(size, config.rms_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_eps, dtype=dtype) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array | ops.Unnormed,
        cos: jax.Array,
        sin: jax.Array,
        attend: Attend,
        residual: jax.Array | None = None,
    ) -> ops.Stream:
        """Attention of x `[T, E]`, plus `residual` if given."""
        qkv = self.qkv(x).reshape(-1, self.heads + 2 * self.kv_heads, self.size)
        norms = None
        if self.q_norm is not None:
            weights = self.q_norm.weight[...], self.k_norm.weight[...]
            norms = ops.HeadNorms(*weights, self.q_norm.eps)
        out = attend(self.layer, qkv, cos, sin, norms)
        return self.out(out.reshape(len(out), -1), residual)


def causal_attend(config, observe: Observe | None = None) -> Attend:
    """Attention of one whole sequence on itself.

    Args:
      config: the model's; its `windows[layer]` limits how far back a token sees.
      observe: called with the layer, the scaled scores `[Hkv, G, T, T]` float32 and the mask
        `[T, T]` of those that are seen.
    """

    def attend(
        layer: int, qkv: jax.Array, cos: jax.Array, sin: jax.Array, norms: ops.HeadNorms | None
    ) -> jax.Array:
        q, k, v = ops.split_heads(qkv, cos, sin, config.num_heads, norms)
        tokens, heads, size = q.shape
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        q = q.reshape(tokens, k.shape[1], -1, size)
        scores = jnp.einsum(
            "qhgd,khd->hgqk", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        seen = back >= 0
        window = config.windows[layer]
        if window is not None:
            seen &= back < window
        scores = scores * size**-0.5
        if observe is not None:
            observe(layer, scores, seen)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        out = jnp.einsum("hgqk,khd->qhgd", weights.astype(v.dtype), v, precision=precision)
        return out.reshape(tokens, heads, size)

    return attend
