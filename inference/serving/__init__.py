"""Serving: one engine answers many requests side by side, each by its own policy, criterion, method and seed.

Read `asks.py` first: what is asked, what is told while an answer is written, and what is answered. `answering.py` turns
an ask into an answer on the one loop of `loop.py`, in a process of its own. The rest is HTTP, in the other process.
"""
