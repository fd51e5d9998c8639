"""Images beside text: which columns hold them, how a processor prepares them, and sequences of such conversations."""
