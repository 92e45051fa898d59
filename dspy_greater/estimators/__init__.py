"""What a candidate promises before it is run: gradients and off-policy forecasts."""
