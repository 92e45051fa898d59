"""Text to tokens and back: chat templates, the instruction's tokens in a rendered prompt, and legal edits of them."""
