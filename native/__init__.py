"""What JAX cannot do by itself on a GPU machine: cupy, ctypes and one small C++ XLA-FFI library.

SM shares by MPS and memory shared between processes (semi-PD, arXiv 2504.19867), and NCCL
collectives on a second stream (FlashOverlap, arXiv 2504.19519). Code here knows pointers, streams
and ranks, never models or requests, and imports neither `jpd` nor `pallas_kernels`.

Nothing is here yet: jpd runs one executor in one process on one device.
"""
