"""A retrieval checkpoint as other libraries call models: `mteb` and `sentence_transformers`, a file each."""
