"""The four training losses and the one place where they are normalised."""
