"""Time and memory of the losses and ops, compared with their alternatives: `python -m bench`, or `pytest bench/`.

A *case* is something to compute, with an fp64 truth; a *contender* is one way to compute it; a *group* is a set of
contenders on one problem (a size and a dtype), timed in interleaved rounds. A contender that fails its case is not
timed.

A new size needs one entry in `problem.SIZES`. A new loss needs nothing apart from its registry entry, or one entry in
`losses.PEERS` to be compared with other implementations. A new op needs one entry in `ops.CASES`.
"""
