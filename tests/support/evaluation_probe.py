"""Run as a child by tests of evaluation: `python -m tests.support.evaluation_probe WHAT SIZES`, JSON on stdout.

It is a new process because memory that an earlier call left in a pool would be reused without showing.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from dml_kernels import evaluation
from dml_kernels.profiling import peak_extra_bytes


def problem(count, width, per_class=20):
    """Vectors around the centres of their classes, class by class, and their labels."""
    labels = torch.arange(count) // per_class
    vectors = torch.randn(count // per_class + 1, width).repeat_interleave(per_class, 0)[:count]
    return vectors.add_(torch.randn(count, width)), labels


def split(queries, gallery, width):
    """Queries from classes spread over the gallery, and the gallery, with their labels."""
    vectors, labels = problem(gallery, width)
    rows = torch.arange(queries) * (gallery // queries)
    return vectors[rows] + torch.randn(queries, width), labels[rows], vectors, labels


def measured(call, large, small):
    """The peak memory and the seconds of a call, and its result."""
    found = []

    def run():
        start = time.perf_counter()
        found.append(call(*large))
        found.append(time.perf_counter() - start)

    peak = peak_extra_bytes(run, lambda: call(*small))
    return {"peak": peak, "seconds": found[1]}, found[0]


def retrieval(queries: int, gallery: int, width: int) -> dict:
    names = ("recall", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank")
    call = lambda q, y, g, c: evaluation.evaluate_retrieval(q, y, g, c, metrics=names)  # noqa: E731
    report, found = measured(call, split(queries, gallery, width), split(64, 3000, width))
    return report | found


def identification(queries: int, gallery: int, width: int) -> dict:
    def call(q, y, g, c):
        labels = torch.where(torch.arange(len(q)) % 2 == 0, y, -1 - y)
        return evaluation.evaluate_identification(q, labels, g, c, far=(0.1,))

    report, found = measured(call, split(queries, gallery, width), split(64, 3000, width))
    return report | {"rank_1": found.rank_1, "detected": found.dir_at_far[0.1, 1], "identities": found.identities}


def verification(count: int, width: int) -> dict:
    report, found = measured(evaluation.verify, problem(count, width), problem(3000, width))
    return report | {"pairs": found.mated + found.other, "roc_auc": found.roc_auc, "error": found.roc_auc_error}


def verification_against(queries: int, gallery: int, width: int) -> dict:
    call = lambda q, y, g, c: evaluation.verify(q, y, ref_embeddings=g, ref_labels=c)  # noqa: E731
    report, found = measured(call, split(queries, gallery, width), split(1500, 3000, width))
    return report | {"pairs": found.mated + found.other, "roc_auc": found.roc_auc, "error": found.roc_auc_error}


def clustering(count: int, width: int, clusters: int, training_rows: int) -> dict:
    def call(x, y):
        return evaluation.cluster_agreement(
            x, y, clusters=clusters, training_rows=training_rows, iterations=5, adjusted=False
        )

    report, found = measured(call, problem(count, width), problem(training_rows, width))
    return report | {"nmi": found.nmi}


def main() -> None:
    what, *sizes = sys.argv[1:]
    torch.manual_seed(0)
    print(json.dumps(globals()[what](*map(int, sizes))))


if __name__ == "__main__":
    main()
