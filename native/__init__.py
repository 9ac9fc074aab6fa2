"""What JAX cannot do by itself on a GPU machine: cupy, ctypes and one small C++ XLA-FFI library.

SM shares by MPS and memory shared between processes (semi-PD, arXiv 2504.19867), and NCCL
collectives on a second stream (FlashOverlap, arXiv 2504.19519). Code here knows pointers, streams
and ranks, never models or requests, and imports neither `jpd` nor `pallas_kernels`.

`mps` and `affinity` give processes shares of a GPU's SMs or of the CPUs; `memory` is blocks that
several processes map. Both have twins for a CPU, so that all but the GPU itself runs without one.
"""
