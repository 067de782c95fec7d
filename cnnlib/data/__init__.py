"""Data sets with one interface: packaged, generated, from TFDS or from image folders; in memory or streamed."""
