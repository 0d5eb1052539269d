"""Device functions and kernels; the modules in the folder above launch them."""
