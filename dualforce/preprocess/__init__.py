"""From raw video to training clips: one function per stage, and `build`, which runs them over a folder."""
