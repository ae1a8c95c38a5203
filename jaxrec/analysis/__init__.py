"""Measurements beside the library: what a model is compared with, and looks inside it."""
