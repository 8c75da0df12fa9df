"""Stands for PyTorch while fairseq is built: see cpp_extension.py."""
