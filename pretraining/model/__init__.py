"""BERT as one readable model, its folders on disk, and the enlargement of a small model to a large shape."""
