"""FlexAvatar in JAX: one portrait in, a complete and animatable 3D Gaussian head out."""
