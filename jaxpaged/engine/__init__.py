"""The engine: requests in, increments of text out; one step is schedule, dispatch, read back, update, detokenize.

May import: runner, models, layers, core, config, sampling_params.
Must never come in: converters, HTTP, command lines.
Read first: `engine.Engine.step`.
"""
