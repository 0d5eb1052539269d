"""Time and memory of the losses and ops, compared with their alternatives: `python -m bench`, or `pytest bench/`.

A *case* is something to compute, with an fp64 truth; a *contender* is one way to compute it; a *group* is a
set of contenders on one problem (a size and a dtype), timed in interleaved rounds. Nothing that fails its
case is timed.

Adding a size: one entry in `problem.SIZES`. Adding a loss: nothing, its registry entry is enough; for
competitors beside it, one entry in `losses.PEERS`. Adding an op: one entry in `ops.CASES`.
"""
