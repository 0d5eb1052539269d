"""Subcommands of ``python -m dml_kernels``."""
