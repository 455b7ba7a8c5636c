"""Lives here: the product of a linear layer, by XLA or by a kernel compiled for the processor at hand.
May import: jax, jaxtyping, and what this package has for platforms and C++ kernels.
Must never come in: anything that knows a layer, a model or a request.
Read first: linear (linear.py), then native_cpu.cc.
"""
