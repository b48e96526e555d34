"""The loop and what it stands on: processes, arithmetic of batches, learning rate, evaluation, the run folder."""
