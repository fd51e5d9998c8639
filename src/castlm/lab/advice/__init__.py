"""Which format of a model pays on which processor."""
