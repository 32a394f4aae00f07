"""One step of AdamW whose moments may be kept in 16 bits: `adamw_`."""

from kernels.adamw.op import adamw_

__all__ = ["adamw_"]
