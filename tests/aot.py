"""Compiles for an H200 where there is none.

Needs the wheels jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc.

Nothing runs; what is compiled is to be read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental import topologies

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""

needs_wheels = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc are not installed",
)


def mesh_of_h200s(count: int, axis: str) -> jax.sharding.Mesh:
    """A mesh of GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_H200, topology=f"1x1x{count}"
    )
    return topologies.make_mesh(topology, (count,), (axis,))


def compile_for_h200(
    fn: Callable[..., Any],
    arguments: Any,
    *,
    donate: tuple[int, ...] = (),
    options: Any = None,
    mesh: tuple[int, str] = (1, "x"),
    specs: Any = None,
) -> Any:
    """The compiled program of a function of arrays, of which shapes and types are taken.

    Args:
      fn: the function.
      arguments: of it.
      donate: which of them.
      options: XLA's.
      mesh: number of GPUs, and name of their axis.
      specs: a `PartitionSpec` for every leaf of the arguments; when not given, every GPU has all.
    """
    gpus = mesh_of_h200s(*mesh)
    if specs is None:
        specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), arguments)

    def abstract_of(a: Any, spec: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(gpus, spec)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    abstract = jax.tree.map(abstract_of, arguments, specs)
    return jax.jit(fn, donate_argnums=donate).lower(*abstract).compile(options)
