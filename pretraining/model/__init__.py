"""BERT as one readable model, its folders on disk, and the view of a small one as a large one."""
