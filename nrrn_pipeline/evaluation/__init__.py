"""How good a denoised volume is."""
