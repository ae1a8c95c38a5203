"""Training: data, optimisation, checkpoints and the loop."""
