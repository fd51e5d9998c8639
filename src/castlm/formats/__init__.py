"""The rounding of weights to numeric formats, of which castlm-runtime has the table."""
