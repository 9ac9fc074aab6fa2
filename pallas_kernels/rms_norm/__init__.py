"""Root-mean-square norm of rows, one launch, each row read once."""

from pallas_kernels.rms_norm.kernel import rms_norm
from pallas_kernels.rms_norm.residual import rms_norm_residual

__all__ = ["rms_norm", "rms_norm_residual"]
