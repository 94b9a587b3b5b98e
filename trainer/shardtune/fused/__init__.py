"""Puts fused operations in the place of what a model's modules compute; `kernels.fused` says which.

A module keeps its class, its parameters and their names: only its `forward` is another, on that one object. What a
module computes is found out by its structure and, where that does not say enough, by trying it on a few numbers.
Parameters are looked up in every forward pass, as strategies exchange them.
"""
