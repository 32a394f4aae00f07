"""The head and its loss in one, without the logits in memory: `linear_cross_entropy`."""

from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.linear_cross_entropy.problem import VocabularyShard

__all__ = ["VocabularyShard", "linear_cross_entropy"]
