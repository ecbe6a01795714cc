"""Statistical Rejection Sampling Optimisation (arXiv:2309.06657): the method and its plumbing."""
