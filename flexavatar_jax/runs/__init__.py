"""A run's folder: config, head template, checkpoints; a model restored from it."""
