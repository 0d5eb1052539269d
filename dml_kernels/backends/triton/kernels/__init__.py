"""Device functions and kernels; the modules one floor up launch them."""
