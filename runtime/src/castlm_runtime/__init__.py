"""Runs language models that castlm has packed, on CPUs and without torch."""
