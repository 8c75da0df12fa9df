"""Training with fairseq's trainer, on one process or several."""
