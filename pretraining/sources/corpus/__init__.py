"""Text of real documents: --source corpus."""
