"""Text and tokens: tokenizers, chat templates, and the split between thinking and answer."""
