"""Published talking-head sets: annotations to clips. Used by `tools.download_hdtf`, `_celebvhq` and `_vfhq`."""
