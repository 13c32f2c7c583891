"""Experiments behind the pages in docs/results: each is a command that writes its page and its plots."""
