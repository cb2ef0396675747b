"""The runtime: a bank attached to a live model, and the coefficients that drive it."""
