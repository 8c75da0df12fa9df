"""The report: records -> rows of runs (aggregate) -> tables (result_tables) -> text.

The formats are Markdown, HTML, LaTeX, CSV and the terminal. Everything is computed from records.
"""
