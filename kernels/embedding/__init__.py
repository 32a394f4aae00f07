"""Rows of a table by number, with a gradient summed in a fixed order: `embedding`."""

from kernels.embedding.op import embedding

__all__ = ["embedding"]
