"""Text in: documents, tokens, packed sequences, and the loader whose position can be saved."""
