"""Experts that train together: their rows in one batch through one frozen base."""
