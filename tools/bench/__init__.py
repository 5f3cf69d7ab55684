"""What the benchmarks share: rates of the machine, recipes to compare, tables."""
