"""How the examples of a step are laid out for the ranks: one file a way, chosen by `data.batching`."""
