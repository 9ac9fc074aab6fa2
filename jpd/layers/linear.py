"""Linear layer and embedding. Weights keep the `[out, in]` layout of Hugging Face checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpd import ops


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A weight drawn with standard deviation 0.02, as Llama was."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """`[M, K] -> [M, N]`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = normal(rngs, (outputs, inputs), dtype)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: jax.Array | ops.Unnormed, residual: jax.Array | None = None) -> jax.Array:
        """The product, plus the bias if there is one, plus `residual` `[M, N]` if given."""
        return ops.linear_of(x, self.weight[...], bias=self._bias(), residual=residual)

    def gated(self, x: jax.Array | ops.Unnormed) -> jax.Array:
        """`silu(gate) * up` `[M, N / 2]`, where gate and up are the halves of the product."""
        return ops.gated_linear_of(x, self.weight[...], bias=self._bias())

    def _bias(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[...]


class SummedLinear(Linear):
    """A linear layer that reads what ranks may have parts of: heads, or channels of an MLP.

    Args:
      over: name of the inputs' logical axis, see `jpd.parallel.rules`.
      others: as for `Linear`.
    """

    def __init__(self, inputs: int, outputs: int, *, over: str, **others: Any):
        super().__init__(inputs, outputs, **others)
        self.over = over

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> ops.Stream:
        """As of `Linear`; with a residual, a stream for a norm to read."""
        weight, bias = self.weight[...], self._bias()
        return ops.summed_linear(x, weight, over=self.over, bias=bias, residual=residual)


class Embedding(nnx.Module):
    """Token ids `[T]` to vectors `[T, E]`, and vectors back to logits when tied."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = normal(rngs, (vocab_size, width), dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return ops.embedding(tokens, self.weight[...])

    def attend(self, x: jax.Array) -> jax.Array:
        """`[M, E] -> [M, V]` with the embedding as the output projection."""
        return ops.linear(x, self.weight[...])
