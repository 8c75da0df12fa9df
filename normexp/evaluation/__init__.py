"""BLEU, perplexity and causality of a trained model."""
