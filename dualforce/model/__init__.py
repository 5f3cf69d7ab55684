"""The dual-tower transformer. Knows nothing of ranks, files or noise schedules."""
