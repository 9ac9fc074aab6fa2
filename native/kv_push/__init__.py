"""KV pages that leave for another device layer by layer, while the step that fills them goes on.

A process opens a link from its pages to those of another process, announces for each step what it
is to send, and launches the step. In the compiled step `filled` after each layer and `ended` last
tell the link how far it is; both are XLA FFI handlers in C++, built on first use. On a GPU a
private stream copies to the peer while later layers compute; on a CPU a thread does.

    link = Link(jax.devices()[0], sources, targets, pages=128, page_bytes=4096)
    number = link.announce([3, 4, 9], [17, 18, 2])
    kv = step(kv)                             # q = filled(layer, q, k, v) ...; x = ended(x, ...)
    arrival = link.wait(number)               # once it has run: the pages are there
"""

from native.build import BuildError
from native.kv_push.handlers import TARGETS, ended, filled
from native.kv_push.link import Arrival, Link, LinkError

__all__ = ["TARGETS", "Arrival", "BuildError", "Link", "LinkError", "ended", "filled"]
