"""The steps of a start, one file each: every step does one thing in each transformer block of a walk."""
