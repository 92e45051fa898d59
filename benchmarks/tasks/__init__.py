"""The tasks that optimizers are compared on."""
