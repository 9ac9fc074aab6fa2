"""Stand-alone GPU kernels written in Pallas (Mosaic GPU), usable without the rest of jpd.

One folder an operation, which holds the function of the same name::

    from pallas_kernels.decode_attention import decode_attention

Decode attention with asynchronous softmax, flat GEMM, GEMV and the choice of the GEMM by shape are
FlashDecoding++'s (arXiv 2311.01282); dense GEMM, prefill attention, RMS norm and rope with the KV
write are what a model needs beside them. They need a GPU of compute capability 9.0, or run in
interpret mode on a CPU (`interpret=plgpu.InterpretGPUParams()`). This package imports only jax and
numpy, never `jpd` or `native`.
"""
