"""Masked language models: data, model, training and the measurements of what came out."""
