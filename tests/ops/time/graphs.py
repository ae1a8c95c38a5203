"""Graphs for tests."""

import numpy as np


def random_edges(rng, nodes, share):
    """Each pair of nodes with a probability, in a random order, some from the higher node."""
    low, high = np.triu_indices(nodes, 1)
    ends = np.stack([low, high], axis=1)[rng.random(len(low)) < share]
    ends = rng.permutation(ends)
    turned = rng.random(len(ends)) < 0.5
    return np.where(turned[:, None], ends[:, ::-1], ends)
