"""The on-disk contract of DualForce: training clips in tar shards. See README.md beside this file."""
