"""`python -m bench.refresh`: what a refresh of the cluster index costs, compared with faiss alone.

It times, per 100 thousand embeddings, the first refresh (k-means++), a warm one after every embedding has moved a
little, and the least that the same clusters cost: one bare `faiss.Kmeans` a class on rows gathered beforehand, with
k-means++ as well, on one thread. Times are medians of interleaved rounds. Both must reach the same inertia before they
are timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dml_kernels.cli import tables
from dml_kernels.clustering import ClusterIndex
from dml_kernels.demo.checkpoint import write_json
from dml_kernels.profiling import interleaved_times

from . import machine
from .busy import Usage, share_of_others

RUNS = Path(__file__).resolve().parent.parent / "runs" / "bench"
ITERATIONS = 10
# Both reach local optima from random starts; their inertias agree within this.
INERTIA_TOLERANCE = 0.02


class Problem:
    """n embeddings of `classes` classes in random order; each class has three modes."""

    def __init__(self, n: int, classes: int, d: int, clusters: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.clusters = clusters
        self.labels = torch.randint(classes, (n,), generator=generator)
        modes = torch.randn(classes, 3, d, generator=generator)
        mode = torch.randint(3, (n,), generator=generator)
        self.x = modes[self.labels, mode] + 0.5 * torch.randn(n, d, generator=generator)
        self.moved = self.x + 0.1 * torch.randn(n, d, generator=generator)
        by_class = self.labels.argsort(stable=True).split(self.labels.bincount(minlength=classes).tolist())
        self.gathered = [self.x[rows].numpy() for rows in by_class if len(rows)]

    def index(self) -> ClusterIndex:
        """Make an index, without its first refresh."""
        return ClusterIndex(self.labels, clusters_per_class=self.clusters, iterations=ITERATIONS)

    def bare_faiss(self) -> float:
        """Run faiss.Kmeans on each class; return the inertia."""
        import faiss

        inertia = 0.0
        for rows in self.gathered:
            kmeans = faiss.Kmeans(
                rows.shape[1], min(self.clusters, len(rows)), niter=ITERATIONS, min_points_per_centroid=1,
                max_points_per_centroid=1 << 30, init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            )  # fmt: skip
            kmeans.train(rows)
            inertia += float(kmeans.index.search(rows, 1)[0].sum())
        return inertia


def measure(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round. Raises AssertionError where the clusters of the index are worse than faiss's own."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = problem.index()
    index.refresh(problem.x)
    ours, bare = index.variance * (len(problem.x) - 1), problem.bare_faiss()
    assert ours <= bare * (1 + INERTIA_TOLERANCE), f"inertia {ours:.4g}, faiss alone {bare:.4g}: not timed"
    sides: list[Tensor] = [problem.moved, problem.x]

    def warm() -> None:
        index.refresh(sides[0])
        sides.reverse()

    variants = {
        "refresh, first": lambda: problem.index().refresh(problem.x),
        "refresh, warm": warm,
        "faiss alone": problem.bare_faiss,
    }
    return interleaved_times(variants, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.refresh", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000, help="default %(default)s")
    parser.add_argument("--classes", default="1000,10000", help="numbers of classes; default %(default)s")
    parser.add_argument("--dim", type=int, default=128, help="default %(default)s")
    parser.add_argument("--clusters", type=int, default=3, help="of each class; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; default %(default)s")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="default runs/bench")
    options = parser.parse_args(argv)
    found, before = machine.describe(), Usage.now()
    records = []
    for classes in map(int, options.classes.split(",")):
        print(f"{options.examples:,} embeddings, {classes:,} classes", file=sys.stderr, flush=True)
        times = measure(Problem(options.examples, classes, options.dim, options.clusters), options.rounds)
        alone = times["faiss alone"]
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, alone, strict=True))
            records.append({"classes": classes, "what": name, "seconds": seconds, "to_faiss": ratio})
    others = share_of_others(before, Usage.now())
    per = 100_000 / options.examples
    rows = [
        (f"{r['classes']:,}", r["what"], f"{statistics.median(r['seconds']) * per:.2f} s", f"{r['to_faiss']:.2f}")
        for r in records
    ]
    title = f"Cluster index, {options.clusters} clusters a class, D = {options.dim}: per 100,000 embeddings"
    tables.show(title, ("classes", "", "median", "x faiss alone"), rows)
    print(f"{machine.line(found)}. Other processes took {others or 0:.0%} of the cores.")
    path = options.out / f"refresh-{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, {"machine": found, "options": vars(options) | {"out": str(options.out)}, "records": records})
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
