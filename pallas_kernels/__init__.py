"""Stand-alone GPU kernels written in Pallas (Mosaic GPU), usable without the rest of jpd.

One folder an operation: decode attention with asynchronous softmax and flat GEMM (FlashDecoding++,
arXiv 2311.01282), prefill attention, and a GEMM that signals finished tiles (FlashOverlap, arXiv
2504.19519). This package imports only jax and numpy, never `jpd` or `native`.

Nothing is here yet: `jpd.ops` runs the XLA implementation of every operation.
"""
