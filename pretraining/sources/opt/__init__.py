"""Text drawn from a causal language model, restricted to a vocabulary: --source opt."""
