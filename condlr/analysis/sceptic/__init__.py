"""Audits of accuracies under attack."""
