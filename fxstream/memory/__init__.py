"""Bytes: counted, predicted, and tiles that fit a budget."""
