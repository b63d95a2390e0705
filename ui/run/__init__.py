"""Run tab: start of a federation and live view of its log directory."""
