"""What a person reads: tables, and HTML files that hold their pictures themselves."""
