"""Correctness and speed on a real GPU, by one command: `python -m bench.gpu` (also: make gpu). It needs only torch.

| file | what |
|---|---|
| `__main__.py` | the stages, their order, the time limit, the results file |
| `store.py` | results, saved after every case, so that an interrupted run continues |
| `checks.py` | build, correctness against fp64, same bits, streams and graphs, compute-sanitizer |
| `speed.py` | ceilings of this GPU, times and peak memory of large problems, compared with the peers |
| `small.py` | latency of small problems, launches counted |
| `tiles.py` | the fastest tiles of the Triton kernels, on request (`--stages autotune`) |
| `peers.py` | other implementations of the same loss |
"""
