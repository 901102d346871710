"""Conversations: turns, and a history that stays equal token for token.

conversation         `Conversation`; async_conversation: the same for coroutines
dialogue             what both have in common
history              messages and answers as token ids; saved_history: as JSON
"""
