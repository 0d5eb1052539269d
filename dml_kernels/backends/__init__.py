"""Who computes the ops: compiled C++ and CUDA, Triton, plain PyTorch, and losses composed from other ops."""
