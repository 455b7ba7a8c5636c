"""Lives here: the host wing - requests, blocks and the scheduler; it decides what each step does, and touches no array.
May import: the standard library, jaxpaged.sampling_params, and this room.
Must never come in: jax, numpy, text, device memory, clocks other than the one handed in.
Read first: SchedulerOutput.
"""
