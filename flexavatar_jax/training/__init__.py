"""What a training run is made of: the step, losses, layout over devices, logs."""
