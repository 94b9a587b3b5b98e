"""Optimizers, the learning rate of each step, and the clipping of gradients."""
