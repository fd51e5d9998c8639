"""Know before you pay: the law that predicts a run's perplexity, an early look at a run's end, and its memory."""
