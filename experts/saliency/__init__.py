"""Saliency measures of experts, their files, ranks and reports."""
