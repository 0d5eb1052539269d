"""Tools for tuning the kernels: ahead-of-time compilation, a report, the cost model, and the timing of tiles."""
