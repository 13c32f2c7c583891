"""Prompts: `data` reads them from files and datasets, `render` turns them into token ids, everywhere in the same way.

Read `render` first; `conversations` tries templates on every kind of conversation before. A prompt is a text or a list
of messages.
"""

from iama.prompts.data import fitting_prompts, load_prompts, read_prompts, with_system_prompt
from iama.prompts.render import Message, Prompt, render_exchange, render_prompt

__all__ = [
    "Message",
    "Prompt",
    "fitting_prompts",
    "load_prompts",
    "read_prompts",
    "render_exchange",
    "render_prompt",
    "with_system_prompt",
]
