"""Text and tokens: vocabularies, detokenization, chat templates.

vocabulary           the bytes of each token
detokenize           tokens to text, one by one, up to a stop string
messages             chat messages, checked
chat_template        messages to token ids; template_variables: what a template gets beside them
"""
