"""Engines: how gradients are made, summed and applied. The trainer sees `base.Engine` only."""
