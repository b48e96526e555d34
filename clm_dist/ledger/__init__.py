"""What a run consumed, over all its starts: hash-chained rows, and what they prove."""
