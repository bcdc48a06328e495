"""What runs at conversion: from a model to the two fx graphs of the converted model."""
