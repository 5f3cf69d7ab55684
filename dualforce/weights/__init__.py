"""Model folders: exported weights under public names, and back."""
