"""Image (and video) tokenizers, one paper a file."""
