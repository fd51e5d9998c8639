"""The laboratory around the product: compare, planning, report, advice and sampling.

Only the command line imports it.
"""
