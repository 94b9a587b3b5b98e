"""What a model's training takes, in floating-point operations: for the model FLOP utilization (MFU).

Counted as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B) and Kaplan et al. 2020 (arXiv:2001.08361,
section 2.1), but with frozen parameters told apart. For each token and each parameter of a matrix product: 2 in the
forward pass, 2 for the gradient of the activations, 2 for its own gradient if it is trained. An embedding that is
looked up is no product; an output layer is one, also where it is tied to the embedding. Attention's own products take
12 · layers · width for each pair of tokens, whether or not a mask hides half of them. What recomputation repeats is not
counted, nor what padding takes: it is no work of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

FORWARD, ACTIVATIONS, WEIGHTS = 2, 2, 2
PAIR = 12


class Stack(NamedTuple):
    """An encoder or a decoder."""

    parameters: int
    """Of matrix products."""
    trained: int
    """Of these, those that are trained."""
    pair: int
    """Operations for a pair of tokens that attention compares: 12 · layers · width."""

    def flops(self, tokens: int) -> int:
        """Of the products with parameters, for so many tokens."""
        return ((FORWARD + ACTIVATIONS) * self.parameters + WEIGHTS * self.trained) * tokens


class Work(NamedTuple):
    """What a model takes for its tokens."""

    encoder: Stack | None
    """Of an encoder-decoder: what reads the sources."""
    decoder: Stack
    """The rest; of other models, all of it."""

    def flops(self, tokens: int, targets: int, examples: int) -> float:
        """Forward and backward, of so many source and target tokens. Of an encoder-decoder, `targets` of them are the
        decoder's, the others the encoder's. Attention is counted as if all examples were of the same length, which is
        a little less than it takes."""
        share = max(examples, 1)
        if self.encoder is None:
            return self.decoder.flops(tokens) + self.decoder.pair * tokens**2 / share
        sources = tokens - targets
        products = self.encoder.flops(sources) + self.decoder.flops(targets)
        # The decoder's tokens are compared with each other and with the encoder's.
        return products + (self.encoder.pair * sources**2 + self.decoder.pair * targets * (targets + sources)) / share


def work_of(model: nn.Module) -> Work:
    """Of a model on the meta device, with its adapters, before it is placed on the ranks."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        looked_up.discard(id(head.weight))
    width = _width(config)
    in_encoder: set[int] = set()
    if config.is_encoder_decoder:
        in_encoder = {id(parameter) for parameter in base.get_encoder().parameters()}
        if head is not None:
            in_encoder.discard(id(head.weight))
    sums = {True: [0, 0], False: [0, 0]}
    counted: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in looked_up or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            size = _elements(module, name, parameter)
            place = sums[id(parameter) in in_encoder]
            place[0] += size
            place[1] += size if parameter.requires_grad else 0
    layers = config.num_hidden_layers
    if not config.is_encoder_decoder:
        return Work(None, Stack(sums[False][0], sums[False][1], PAIR * layers * width))
    own = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
    encoder, decoder = sums[True], sums[False]
    return Work(Stack(encoder[0], encoder[1], PAIR * layers * width), Stack(decoder[0], decoder[1], PAIR * own * width))


def _width(config: Any) -> int:
    """Of the queries, over all heads."""
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return config.num_attention_heads * size if size else config.hidden_size


def _elements(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """Of a parameter as the product has it: a quantized one is stored as fewer numbers."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return features[0] * features[1] if name == "weight" and all(features) else parameter.numel()  # pyright: ignore
