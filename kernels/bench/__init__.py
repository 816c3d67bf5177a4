"""What the kernels cost: measured here, beside others, and counted for chips that aren't here."""
