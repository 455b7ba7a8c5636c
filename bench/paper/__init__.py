"""The evaluation of the paper (Kwon et al. 2023) on this engine: each module is one of its experiments."""
