"""The backends that compute the ops: compiled C++ and CUDA, Triton, plain PyTorch, and losses composed of ops."""
