"""`castlm serve`: an engine that decodes several requests together, and the OpenAI API in front of it."""
