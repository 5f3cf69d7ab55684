"""Ranks and kernels: what the model is run with. Imports no project package."""
