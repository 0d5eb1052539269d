"""Losses over the batches of all processes: R ranks, a batch each, and every rank computes the loss of them all.

.. code-block:: python

    network, loss = DistributedDataParallel(network), DistributedLossWrapper(losses.MultiSimilarityLoss())
    miner = DistributedMinerWrapper(miners.MultiSimilarityMiner())
    embeddings = network(inputs)
    loss(embeddings, labels, miner(embeddings, labels)).backward()

``loss(*gather(embeddings, labels))`` is the same by hand, for any function of embeddings and labels.

**Whose gradient it is.** Rank r has embeddings E_r = f(inputs_r; θ) and computes L_r(E_1, ..., E_R; W), where W are
the parameters of the loss: a bank of proxies, say. The objective is the mean L = 1/R Σ_r L_r. As every rank computes
the loss of the whole batch, the L_r are equal, and L is that loss. (``efficient=True`` compares each rank's own rows
alone with all: then L is the mean of the ranks' losses.)

- Network: dL/dθ = 1/R Σ_s (dE_s/dθ)ᵀ Σ_r dL_r/dE_s. DistributedDataParallel averages over s. So rank s must have Σ_r
  dL_r/dE_s at its embeddings: the backward of ``gather`` is this sum, a reduce-scatter, with the factor 1.
- Bank: dL/dW = 1/R Σ_r dL_r/dW, which is DistributedDataParallel's average of what the ranks have already: factor 1.
  ``DistributedDataParallel(DistributedLossWrapper(loss))`` is right. Outside it the bank is right too where the L_r are
  equal, since every rank then has the whole gradient, if all ranks start from the same parameters: do not sum it.

``gradient="sum"`` is for loops that sum gradients over the ranks and do not average: the wrapper then divides all by R,
the bank's too; ``gather`` knows the embeddings alone, so a bank's gradient is then whole on each rank, and must not be
summed.

pytorch-metric-learning's wrapper gathers without a gradient and multiplies the loss by R instead: the network's
gradient is the same, but the value, the bank's gradient and its regulariser's are R times too large.

A gradient taken inside a step (``create_graph=True``) is that of Σ_r L_r, with second derivatives across the ranks: the
backward of each collective is the other one.

Every rank makes the same calls, backward included, or the others wait for it. Batches may differ in length, and be
empty; lengths are exchanged at each call, for which a GPU is waited for. Without a process group, and on one rank, all
of this passes its arguments through.
"""

from __future__ import annotations

from .gathering import Gathered, GlobalTuple, gather
from .wrappers import DistributedLossWrapper, DistributedMinerWrapper

__all__ = ["DistributedLossWrapper", "DistributedMinerWrapper", "Gathered", "GlobalTuple", "gather"]
