"""Root-mean-square norm of rows, one launch, each row read once."""

from pallas_kernels.rms_norm.kernel import rms_norm

__all__ = ["rms_norm"]
