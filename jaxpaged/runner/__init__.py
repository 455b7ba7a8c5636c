"""The runner: the one room where a plan of the host becomes arrays of the device.

May import: models, layers, core, config, sampling_params, pallas_kernels, jax, numpy.
Must never come in: text, tokenizers, HTTP, checkpoints, scheduling decisions.
Read first: `model_runner.ModelRunner`.
"""
