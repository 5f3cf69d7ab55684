"""From a model, an image and a sound to a talking video."""
