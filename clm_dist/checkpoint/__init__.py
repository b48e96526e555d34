"""Checkpoints: what is in one, how it becomes one at a single moment, which one to trust. Nothing is ever unpickled."""
