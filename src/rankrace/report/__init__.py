"""What a person reads: the page of a run and the model card of its adapter."""

from rankrace.report.card import write_card
from rankrace.report.page import write_report

__all__ = ["write_card", "write_report"]
