"""`report.html`, the card and the summary of a run, from the files of its run folder and nothing else. Imports no torch.

What a report may say about privacy is read from the ledger alone (see docs/privacy.md). The sheet that shows sensitive images
is never embedded: a report gets passed on, and pictures in it would be too.
"""

from privimage_fast.report.build import build_card, build_report, outdated_figures, published_card, summary_table
from privimage_fast.report.text import epsilon_text

__all__ = ["build_card", "build_report", "epsilon_text", "outdated_figures", "published_card", "summary_table"]
