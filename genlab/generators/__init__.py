"""Autoregressive generators over tokens, one paper a file."""
