"""Whole losses composed from the ops: for backends without a fused version, and to differentiate twice."""
