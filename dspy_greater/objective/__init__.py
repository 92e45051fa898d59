"""What an instruction is worth: rollouts on every row, the metric, exact losses."""
