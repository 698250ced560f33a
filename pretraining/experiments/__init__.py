"""Whole experiments: which runs and measurements they need, doing them, and choosing what depends on a result."""
