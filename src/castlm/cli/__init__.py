"""The commands, one file each. Nothing else reads argv."""
