r"""Tables for a paper: `\input{tables/iwslt14.tex}` needs the package booktabs only."""

import re

from normexp.report.table import Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≈": r"$\approx$",
    "—": "---",
    "∞": r"$\infty$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def results_tex(content: Table, caption: str, label: str) -> str:
    """Write a floating table with its notes below it, without the column of record links."""
    shown = [i for i, name in enumerate(content.header) if name != "records"]
    lines = [
        "% Made by scripts/report.py from the records; do not edit.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(caption)}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{{'l' + 'r' * (len(shown) - 1)}}}",
        r"\toprule",
        " & ".join(_escape(content.header[i]) for i in shown) + r" \\",
        r"\midrule",
        *(" & ".join(_escape(str(row[i])) for i in shown) + r" \\" for row in content.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {_escape(note.text)}" for note in content.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return re.sub("|".join(map(re.escape, _SPECIAL)), lambda match: _SPECIAL[match[0]], text)
