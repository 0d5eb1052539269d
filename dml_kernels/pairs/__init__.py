"""What a loss or a miner compares: the batch, tuples of a miner, runs of a class, sums over the pairs."""
