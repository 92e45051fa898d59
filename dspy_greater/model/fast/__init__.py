"""What makes the model fast and changes no result: shared prefixes, kept states, drafts."""
