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


def compile_for_h200(
    fn: Callable[..., Any], arguments: Any, *, donate: tuple[int, ...] = (), options: Any = None
) -> Any:
    """The compiled program of a function of arrays, of which shapes and types are taken."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    return jax.jit(fn, donate_argnums=donate).lower(*abstract).compile(options)
