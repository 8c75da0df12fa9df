"""From Hydra's configuration to typed settings and to fairseq's configuration."""
