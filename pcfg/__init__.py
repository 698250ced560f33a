"""Grammars with a known distribution: sampling, charts, labels and masked conditionals."""
