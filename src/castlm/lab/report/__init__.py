"""HTML reports: the page of a run, and the charts and the template that `castlm compare` shares with it."""
