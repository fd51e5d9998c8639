"""Predictions before a run is paid for: its perplexity by a scaling law, and its memory."""
