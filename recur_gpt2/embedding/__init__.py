"""Document embeddings: pooling, streams, files, search."""
