"""Vocabulary and tokenizer, masking, and the files of masked samples."""
