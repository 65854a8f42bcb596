"""Weights that `genlab list` finds: every model of genlab's zoo that is not in genlab's own wheel."""
