"""Published systems, each one file: configuration, model, published sizes."""
