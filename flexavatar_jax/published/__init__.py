"""The published FLEX-1 checkpoint: its tensors' names, and weights by a rule for parity."""
