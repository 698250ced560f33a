"""Masked-LM pre-training on DeepSpeed: command line, schedules, batches, the training loop and its records."""
