"""Where pre-training text comes from: a grammar, a causal language model, a corpus."""
