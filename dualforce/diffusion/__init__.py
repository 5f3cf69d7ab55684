"""Diffusion Forcing: per-frame noise levels, mixing, and the sampling schedule."""
