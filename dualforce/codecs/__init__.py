"""Frozen encoders and decoders: pixels, sound, face motion and media files. Each extractor has a tag of its own."""
