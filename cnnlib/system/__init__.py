"""Machine and files: cores, memory, signals, cache folder, JSON files, provenance, tables for the terminal."""
