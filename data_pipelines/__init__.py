"""From captures on disk to training batches: preparing, mixing, augmenting, procedural heads."""
