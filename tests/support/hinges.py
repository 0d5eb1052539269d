"""Problems for masked_hinge_sum: each row's scores form two groups, and its threshold is in the gap between them.

The same terms are then positive in every dtype, so that gradients can be held to the tolerance rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dml_kernels import functional as F
from dml_kernels import reference
from tests.support.problems import Problem, randint, randn

SAME, DIFFERENT = (-1.5, 0.1), (2.0, -0.3)


def two_groups(n: int, m: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows near a vector v, and bank entries near v and -v."""
    v = randn(d, seed=seed + 7)
    v /= v.norm()
    sign = 1 - 2 * (torch.arange(m)[:, None] % 2)  # two entries are already two groups
    x, w = (0.5 * randn(rows, d, seed=seed + i) / math.sqrt(d) for i, rows in enumerate((n, m)))
    return x + v, w + sign * v


def middle_of_the_gap(s: Tensor) -> Tensor:
    """The middle of the widest gap in the scores of each row."""
    if s.size(1) < 2 or s.size(0) == 0:
        return s.new_full((s.size(0),), 0.1) + (s[:, 0] if s.size(1) else 0)
    ordered = s.sort(1).values
    widest = (ordered[:, 1:] - ordered[:, :-1]).argmax(1, keepdim=True)
    return (ordered.gather(1, widest) + ordered.gather(1, widest + 1)).squeeze(1) / 2


class HingeProblem(Problem):
    """`tensors` are x, w, t_same and t_different."""

    @staticmethod
    def random(n, m, d, metric="euclidean", normalize=True, seed=0, relative=False):
        x, w = two_groups(n, m, d, seed)
        y = randint(0, m, n, seed=seed + 2)
        s = reference.scores(x, w, metric, normalize)
        middle = middle_of_the_gap(s)
        if relative:
            middle = middle - s.gather(1, y[:, None]).squeeze(1)
        tensors = {"x": x, "w": w}
        for name, (k, o) in (("t_same", SAME), ("t_different", DIFFERENT)):
            tensors[name] = -k * middle - o
        grads = {name: randn(n, seed=seed + 3 + i) for i, name in enumerate(("same", "different"))}
        options = {"metric": metric, "normalize": normalize, "same": SAME, "different": DIFFERENT, "relative": relative}
        return HingeProblem(tensors, y, options, grads, seed=seed)

    def call(self, leaves: Mapping[str, Tensor], backend: str) -> F.MaskedHingeSum:
        given = {k: self.layout(k, t) for k, t in leaves.items()}
        rest = {k: self.layout(k, v) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        threshold = given.get("t_same"), given.get("t_different")
        y = self.layout("y", self.y)
        return F.masked_hinge_sum(given["x"], given["w"], y, threshold=threshold, **rest, backend=backend)

    def ours(self, leaves, backend):
        out = self.call(leaves, backend)
        return {"same": out.same, "different": out.different}

    def dense(self, leaves, product):
        rest = dict(self.options)
        rest["normalized"] = rest.pop("normalize")
        given = dict(leaves)
        x, w = given.pop("x").to(product), given.pop("w").to(product)
        out = reference.masked_hinge_sum(x, w, self.y, **given, **rest)
        return {"same": out[0], "different": out[1]}
