"""What a loss or a miner compares: the batch, a miner's tuples, the ranges of classes, and sums over the pairs."""
