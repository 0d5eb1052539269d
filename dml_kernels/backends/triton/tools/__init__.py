"""Tools for tuning the kernels: compiling ahead of time, a report, the cost model, timing tiles."""
