"""clm-dist: train causal language models on many processes, exactly."""

__version__ = "0.1.0"
