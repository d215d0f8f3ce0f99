"""sslfast: fused kernels and training loops for self-supervised learning in PyTorch."""
