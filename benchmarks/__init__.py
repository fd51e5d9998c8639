"""Ratios measured side by side in one run, printed as one table and written as JSON. Never part of the tests."""
