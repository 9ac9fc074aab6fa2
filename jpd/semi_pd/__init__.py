"""semi-PD: prefill and decode as two processes on one GPU (arXiv 2504.19867)."""
