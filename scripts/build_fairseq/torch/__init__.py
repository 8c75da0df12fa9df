"""Stands for PyTorch while fairseq is built: see utils/cpp_extension.py."""
