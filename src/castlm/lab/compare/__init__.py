"""One harness for CAST and its rivals: the same data, teacher, budget and seeds, and one table."""
