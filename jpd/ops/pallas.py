"""The implementation "pallas" of every op: kernels of `pallas_kernels` for Hopper GPUs.

They are imported when one is first traced, so that nobody else pays for loading the compiler. What
a kernel does not take, and any other device, is a `NotImplementedError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

from jpd.config import KernelConfig
from jpd.ops import registry
from jpd.ops.attention import DecodeAttention
from jpd.ops.registry import register
from jpd.ops.rope import HeadNorms

NAME = "pallas"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What kernels depend on of the GPU that they are made for."""

    kind: str
    """As jax names it, "NVIDIA H200"."""
    sms: int
    """SMs that the process may use: fewer under an MPS share than the chip has."""
    capability: str
    """Compute capability, "9.0"."""


@dataclasses.dataclass(frozen=True)
class _Target:
    interpret: Any
    capability: str | None = None
    """None lets every kernel pass."""


_TARGET: ContextVar[_Target | None] = ContextVar("jpd_pallas_target", default=None)
_WRITTEN: ContextVar[Any] = ContextVar("jpd_pallas_written", default=lambda: None)
"""Weak reference to the pages of keys that the kernel `rope_write` returned last."""


@contextlib.contextmanager
def kernels_without_gpu(interpret: Any = None) -> Iterator[None]:
    """Traces the kernels although there is no GPU, for tests.

    Args:
      interpret: `plgpu.InterpretGPUParams` runs them on the CPU; None is for programs that are
        lowered for a GPU, and cannot run here.
    """
    token = _TARGET.set(_Target(interpret))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def tracing_for(gpu: Gpu) -> Iterator[None]:
    """Programs traced inside the block for a platform "gpu" are made for this one.

    The process needs to see neither it nor any other.
    """
    from pallas_kernels import mosaic

    token = _TARGET.set(_Target(None, gpu.capability))
    try:
        with mosaic.tracing_for(gpu.kind, gpu.sms):
            yield
    finally:
        _TARGET.reset(token)


def gpu_seen() -> Gpu:
    """The GPU of this process, for `tracing_for` in another."""
    from pallas_kernels import mosaic

    device = jax.local_devices(backend="gpu")[0]
    return Gpu(device.device_kind, mosaic.sm_count(), device.compute_capability)


def pretending() -> bool:
    """Whether `kernels_without_gpu` or `tracing_for` holds, so that not this process's GPU counts.

    What is traced then may be interpreted, and says nothing about the next start.
    """
    return _TARGET.get() is not None


def _refusal() -> str | None:
    """Why no kernel can run in the program that is being traced; None if they can."""
    target = _TARGET.get()
    if target is not None and target.capability is None:
        return None
    if registry.platform() != "gpu":
        return f"the kernels run on GPUs, not on {registry.platform()!r}"
    if target is not None:
        capability = target.capability
    else:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    if not capability.startswith("9."):
        return f"the kernels are written for compute capability 9.0, this GPU has {capability}"
    return None


def interpret_mode() -> Any:
    """The `interpret` argument of the kernels in the program that is being traced.

    Raises:
      NotImplementedError: no kernel can run here.
    """
    refusal = _refusal()
    if refusal is not None:
        raise NotImplementedError(refusal)
    target = _TARGET.get()
    return None if target is None else target.interpret


def may_run(kernels: KernelConfig, platform: str | None = None) -> bool:
    """Whether a program that is traced with this selection may hold a kernel."""
    with registry.using(kernels, platform):
        if _refusal() is not None:
            return False
    selected = (op.candidates(getattr(kernels, name)) for name, op in registry.ops().items())
    return any(NAME in names for names in selected)


def product_choice(rows: int, n: int, k: int, *, gated: bool) -> Any:
    """What decides which program computes a product in the one that is traced; None where no kernel
    is tried.

    Args:
      rows: of the activations.
      n: rows of the weight.
      k: inputs.
      gated: the op is `gated_linear`, else `linear`.
    """
    if not _tried("gated_linear" if gated else "linear"):
        return None
    choice = _dataflow_choice(rows, n, k, gated)
    # The GEMV is another program for each number of rows.
    return choice.kernel, choice.config, rows if choice.kernel == "gemv" else None


def takes_norm(x: jax.Array, norm: jax.Array, weight: jax.Array, *, gated: bool) -> bool:
    """Whether a product in the program that is traced takes an RMS norm of its activations along.

    Only where both ops would turn to these kernels first: no other implementation of a product has
    an argument `norm`, and no other norm may be left out.

    Args:
      x: activations `[M, K]`.
      norm: weight of the norm `[K]`.
      weight: of the product, `[N, K]`.
      gated: the op is `gated_linear`, else `linear`.
    """
    product = ("gated_linear", gated_linear_pallas) if gated else ("linear", linear_pallas)
    if not (_first(*product) and _first("rms_norm", rms_norm_pallas)):
        return False
    from pallas_kernels import checks

    if len({x.dtype, norm.dtype, weight.dtype}) > 1 or x.dtype.name not in checks.DTYPES:
        return False
    return _dataflow_choice(len(x), *weight.shape, gated).takes_norm(len(x))


def _dataflow_choice(rows: int, n: int, k: int, gated: bool) -> Any:
    from pallas_kernels import dataflow

    only = registry.selection().pallas_only
    return dataflow.choose(rows, n, k, gated=gated, pallas_only=only)


def decode_choice(batch: int, heads: int, kv_heads: int, head_dim: int) -> Any:
    """Configuration of decode attention in the program that is traced; None likewise."""
    if not _tried("decode_attention"):
        return None
    from pallas_kernels.decode_attention import config

    return config.choose(head_dim, heads // kv_heads, batch, kv_heads)


def _candidates(name: str) -> list[str]:
    """The implementations of an op that the program that is traced tries, if kernels can run."""
    selected, op = registry.selection(), registry.ops()[name]
    names = op.candidates(getattr(selected, name), pallas_only=selected.pallas_only)
    return names if _refusal() is None else []


def _tried(name: str) -> bool:
    """Whether the program that is traced turns to these kernels for an op."""
    return NAME in _candidates(name)


def _first(name: str, implementation: Callable[..., Any]) -> bool:
    """Whether it turns to this one before any other."""
    registered = registry.ops()[name].implementations.get(NAME)
    return _candidates(name)[:1] == [NAME] and registered is implementation


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """Kernels traced inside the block share their counters, so that a step clears them once."""
    if not may_run(registry.selection(), registry.platform()):
        yield
        return
    from pallas_kernels.workspace import workspace as shared

    with shared():
        yield


def describe() -> dict[str, str]:
    """What the kernels see of the machine, for `jpd env`; never fails."""
    try:
        refusal = _refusal()
    except (RuntimeError, AssertionError) as error:  # jax finds no device
        refusal = str(error)
    if refusal is not None:
        return {"kernels": f"not used: {refusal}"}
    from pallas_kernels import dataflow, mosaic

    return {
        "kernels": "used",
        "gpu": dataflow.device_kind(),
        "streaming multiprocessors seen": str(mosaic.sm_count()),
        "dataflow table": dataflow.coverage(),
    }


def _linear(x, weight, *, bias, residual, gated, norm):
    interpret = interpret_mode()
    from pallas_kernels import dataflow

    return dataflow.linear(
        x,
        weight,
        bias=bias,
        residual=residual,
        gated=gated,
        norm=norm,
        pallas_only=registry.selection().pallas_only,
        interpret=interpret,
    )


def linear_pallas(x, weight, *, bias=None, residual=None, norm=None):
    """GEMV, flat or dense GEMM or, unless `pallas_only`, a refusal in favour of XLA: by table.

    Where `takes_norm` says so, `norm`, a weight `[K]` and what is added to the mean square, is of
    an RMS norm of x that comes first.
    """
    return _linear(x, weight, bias=bias, residual=residual, gated=False, norm=norm)


def gated_linear_pallas(x, weight, *, bias=None, norm=None):
    """The same with the activation in the epilogue."""
    return _linear(x, weight, bias=bias, residual=None, gated=True, norm=norm)


def rms_norm_pallas(x, weight, eps):
    """One launch; rows stay in registers."""
    interpret = interpret_mode()
    from pallas_kernels.rms_norm import rms_norm

    if x.ndim != 2:
        raise NotImplementedError(f"x {x.shape}: a matrix is expected")
    return rms_norm(x, weight, eps=eps, interpret=interpret)


def rope_write_pallas(
    qkv, cos, sin, k_pages, v_pages, slots, *, num_heads, norms: HeadNorms | None = None
):
    """One launch, in place."""
    interpret = interpret_mode()
    from pallas_kernels.rope_write import rope_write

    q, k_pages, v_pages = rope_write(
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        slots,
        num_heads=num_heads,
        q_norm=None if norms is None else norms.q,
        k_norm=None if norms is None else norms.k,
        eps=None if norms is None else norms.eps,
        interpret=interpret,
    )
    _WRITTEN.set(weakref.ref(k_pages))
    return q, k_pages, v_pages


def decode_attention_pallas(
    q, k_pages, v_pages, page_table, lengths, *, scale, window=None, phi=None, early=False
):
    """Asynchronous softmax over splits of each row; rows that leave its range are redone.

    Early only if the pages come from the kernel `rope_write`, which starts no other before all that
    came before it is complete. What XLA writes them by may copy them and lets others start at will.
    """
    interpret = interpret_mode()
    from pallas_kernels.decode_attention import decode_attention

    result = decode_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        scale=scale,
        window=window,
        phi=phi,
        early=early and _WRITTEN.get()() is k_pages,
        interpret=interpret,
    )
    return DecodeAttention(result.out, result.recomputed)


def prefill_attention_pallas(
    q, k_pages, v_pages, page_table, starts, counts, contexts, *, scale, window=None
):
    """Causal attention over pages."""
    interpret = interpret_mode()
    from pallas_kernels.prefill_attention import prefill_attention

    return prefill_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        starts,
        counts,
        contexts,
        scale=scale,
        window=window,
        interpret=interpret,
    )


for _op, _fn in (
    ("linear", linear_pallas),
    ("gated_linear", gated_linear_pallas),
    ("rms_norm", rms_norm_pallas),
    ("rope_write", rope_write_pallas),
    ("decode_attention", decode_attention_pallas),
    ("prefill_attention", prefill_attention_pallas),
):
    register(_op, NAME, _fn, first=True)
