"""Activations and their derivatives, for kernels.

GELU in its tanh form is z times a sigmoid, and so is its derivative, with u = sqrt(2 / pi) (z +
0.044715 z^3):

    s = 1 / (1 + exp(-2 u))        gelu(z) = z s        gelu'(z) = s (1 + 2 z u' (1 - s))

SwiGLU of a row z = [g | u], with s = 1 / (1 + exp(-g)), is a = g s u, so that

    du = d g s        dg = d u s (1 + g (1 - s))
"""

import math

import triton
import triton.language as tl

# exp(-2 u) = 2^(z (A + B z^2)); 2 z u' = z (C + E z^2)
ROOT = math.sqrt(2 / math.pi)
A = tl.constexpr(-2 * ROOT * math.log2(math.e))
B = tl.constexpr(-2 * ROOT * math.log2(math.e) * 0.044715)
C = tl.constexpr(2 * ROOT)
E = tl.constexpr(2 * ROOT * 3 * 0.044715)
MINUS_LOG2_E = tl.constexpr(-math.log2(math.e))


@triton.jit
def gelu(z):
    """(gelu(z), gelu'(z)), of fp32."""
    square = z * z
    s = 1.0 / (1.0 + tl.exp2(z * (A + B * square)))
    return z * s, s * (1.0 + z * (C + E * square) * (1.0 - s))


@triton.jit
def silu(g):
    """(silu(g), silu'(g)), of fp32."""
    s = 1.0 / (1.0 + tl.exp2(g * MINUS_LOG2_E))
    return g * s, s + g * s * (1.0 - s)
