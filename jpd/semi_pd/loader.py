"""Fills the weights blocks from a checkpoint, in a process that ends when that is done.

A process of its own, so that what JAX takes for loading (compiled programs, its memory pool, a
CUDA context) is given back, and so that the process that holds the memory needs no JAX. While it
runs each device holds its weights twice: as they were loaded, and in the block.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpd.child import connect, spawn
from jpd.errors import ConfigError, EngineDeadError, JpdError
from jpd.semi_pd.layout import Layout
from native.memory import Handle, open_block

if TYPE_CHECKING:
    from jpd.parallel import Split


def run(
    folder: Path,
    options: dict[str, Any],
    weights: Sequence[Handle],
    layout: Layout,
    split: Split,
    env: Mapping[str, str],
) -> None:
    """Starts a loader and waits until the blocks are filled.

    Args:
      folder: A model folder.
      options: Keywords of `jpd.checkpoint.load`, but for `device` and `placement`.
      weights: The block of each rank.
      layout: Of a block.
      split: Of the model over the ranks.
      env: Variables for the process beside this one's own.

    Raises:
      ConfigError: as `jpd.checkpoint.load` does; or its parameters are not those of `layout`.
      EngineDeadError: the loader failed in another way.
    """
    fds = [fd for handle in weights for fd in handle.fds]
    child = spawn("jpd.semi_pd.loader", fds=fds, env=env)
    try:
        child.connection.send((folder, options, weights, layout, split))
        error = child.connection.recv()
        child.wait()
    except (EOFError, ConnectionError) as end:
        raise EngineDeadError(f"the loader of {folder} ended, exit code {child.wait()}") from end
    finally:
        child.kill()
    if error is not None:
        raise error


def _fill(
    folder: Path, options: dict[str, Any], weights: Sequence[Handle], layout: Layout, split: Split
) -> None:
    # Here and not above: JAX takes seconds to import, and `run` is called where there is none.
    from jpd import checkpoint
    from jpd.models.family import flatten
    from jpd.parallel import place
    from jpd.semi_pd.arrays import start_jax

    placement = place(split, start_jax([handle.device for handle in weights]))
    _, params = checkpoint.load(folder, placement=placement, **options)
    wanted = {field.path: (field.shape, field.dtype) for field in layout.fields}
    for rank, handle in enumerate(weights):
        leaves = dict(flatten(placement.of_rank(params, rank)))
        found = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}
        if found != wanted:
            different = sorted(map(str, dict(found.items() ^ wanted.items())))
            raise ConfigError(
                f"{folder} has other parameters than room was made for: {', '.join(different)}"
            )
        with open_block(handle) as block:
            for field in layout.fields:
                block.write(field.offset, leaves[field.path])


def _main() -> None:
    connection = connect()
    try:
        task = connection.recv()
    except EOFError:  # nobody waits for it any more
        return
    try:
        _fill(*task)
    except JpdError as error:
        connection.send(error)
    except Exception as error:
        traceback.print_exc()
        connection.send(EngineDeadError(f"the loader failed: {type(error).__name__}: {error}"))
    else:
        connection.send(None)


if __name__ == "__main__":
    _main()
