"""Documents: corpora, text files, tokenising, batches of windows. Knows no model."""
