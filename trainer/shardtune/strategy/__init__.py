"""How model, gradients and optimizer are spread over the ranks: one file a family, chosen by `strategy.kind`."""
