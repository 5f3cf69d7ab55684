"""From shards to training batches: order of the clips, cropping, normalisation, audio windows, reading ahead."""
