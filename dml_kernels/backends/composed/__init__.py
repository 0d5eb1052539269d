"""Whole losses composed of the ops, for backends without a fused version and for second derivatives."""
