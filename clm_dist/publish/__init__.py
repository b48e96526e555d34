"""What leaves a run: metrics, model folders with their cards, the report."""
