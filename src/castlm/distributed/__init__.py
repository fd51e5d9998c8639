"""The ranks of a run: sharding, sharded loading and export, and the check of masks across ranks."""
