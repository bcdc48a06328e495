"""What `fxstream.convert` returns."""
