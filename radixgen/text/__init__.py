"""Text and tokens: vocabularies, messages, chat templates.

vocabulary           the bytes of each token
messages             chat messages, checked
chat_template        messages to token ids; template_variables: what a template gets beside them
"""
