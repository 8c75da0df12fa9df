"""Weights & Biases: logging, uploading offline runs, dashboards."""
