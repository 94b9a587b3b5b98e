"""Fused operations for fine-tuning, usable without shardtune: every op is a function of this package."""
