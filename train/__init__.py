"""Training: one loop, its configs and recipes."""
