"""What a search is going to cost: a short probe of this model on this machine, and tokens counted from the settings."""
