"""Names, writers and truthful clocks: what a run tells about itself."""
