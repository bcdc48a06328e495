"""The proof of a conversion: the graph and the plain model run side by side on a small random image."""
