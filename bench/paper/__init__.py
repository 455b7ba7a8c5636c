"""The evaluation of the paper (Kwon et al. 2023) on this engine: each module is one of its experiments.

May import: bench's other modules, the engine. Must never come in: another engine, torch; a policy that changes kernels
or order, so that only memory differs.
Read first: reservation.py (the baselines), then the experiments.
"""
