"""What was measured, as one page: `results.csv`, plots, and of experiments the findings with their statistics."""
