"""Files: read with one kind of error, written whole or not at all, and deleted only where castlm wrote them."""
