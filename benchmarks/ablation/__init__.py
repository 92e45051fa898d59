"""What each part of the search is worth: the same tasks and the same generated tokens, one part changed at a time."""
