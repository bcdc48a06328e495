"""What runs at every call: the streamed graph, tile by tile."""
