"""Conversations: the rows that hold them, and the chat templates that render them."""
