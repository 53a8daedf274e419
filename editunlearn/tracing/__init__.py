"""Which states of a model carry a fact: causal tracing (Meng et al. 2022, arXiv 2202.05262) and a fast estimate."""
