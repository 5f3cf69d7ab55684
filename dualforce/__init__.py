"""DualForce: a trainer for causal, audio-driven dual-tower talking-head diffusion."""

__version__ = "0.1.0"
