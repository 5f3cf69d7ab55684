"""AdamW in one pass: gradient as it was reduced, weights, moments, and the model's copy of the weights."""
