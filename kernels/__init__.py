"""GPU kernels. Each op is a folder: reference, kernels, tiles, op, README."""
