"""shardtune: distributed fine-tuning of encoder-decoders, decoders and encoders from one config file."""

__version__ = "0.1.0"
