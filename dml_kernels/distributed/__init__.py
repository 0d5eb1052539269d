"""Losses over the batches of all processes: each of R ranks has a batch and computes the loss of all batches together.

.. code-block:: python

    network, loss = DistributedDataParallel(network), DistributedLossWrapper(losses.MultiSimilarityLoss())
    miner = DistributedMinerWrapper(miners.MultiSimilarityMiner())
    embeddings = network(inputs)
    loss(embeddings, labels, miner(embeddings, labels)).backward()

``loss(*gather(embeddings, labels))`` does the same for any function of embeddings and labels.

**The scale of gradients.** Rank r has embeddings E_r = f(inputs_r; θ) and computes L_r(E_1, ..., E_R; W), where W are
the parameters of the loss, for example a bank of proxies. The objective is the mean L = 1/R Σ_r L_r. Every rank
computes the loss of the whole batch, so the L_r are equal, and L is that loss. (``efficient=True`` compares only each
rank's own rows with all rows; then L is the mean of the ranks' losses.)

- Network: dL/dθ = 1/R Σ_s (dE_s/dθ)ᵀ Σ_r dL_r/dE_s. DistributedDataParallel averages over s, so rank s needs
  Σ_r dL_r/dE_s at its embeddings. The backward of ``gather`` is this sum, a reduce-scatter, with the factor 1.
- Bank: dL/dW = 1/R Σ_r dL_r/dW. DistributedDataParallel takes this average of the ranks' gradients, so the factor is 1,
  and ``DistributedDataParallel(DistributedLossWrapper(loss))`` is right. Without DistributedDataParallel the gradient
  of the bank is right too where the L_r are equal and all ranks start from the same parameters, because every rank then
  has the whole gradient: do not sum it.

``gradient="sum"`` is for loops that sum gradients over the ranks instead of averaging them. The wrapper then divides
all gradients by R, including that of the bank. ``gather`` sees only the embeddings, so after it the gradient of a bank
is whole on each rank, and must not be summed.

The wrapper of pytorch-metric-learning gathers without a gradient and multiplies the loss by R instead: the gradient of
the network is the same, but the value and the gradients of the bank and its regulariser are R times too large.

A gradient that is computed inside a step (``create_graph=True``) is that of Σ_r L_r, with second derivatives across the
ranks: the backward of each collective is the other one.

Every rank must make the same calls, including backward, or the others wait for it. Batches may differ in length, and
may be empty; the lengths are exchanged at each call, which waits for a GPU. Without a process group, and on one rank,
everything here passes its arguments through.
"""

from __future__ import annotations

from .gathering import Gathered, GlobalTuple, gather
from .wrappers import DistributedLossWrapper, DistributedMinerWrapper

__all__ = ["DistributedLossWrapper", "DistributedMinerWrapper", "Gathered", "GlobalTuple", "gather"]
