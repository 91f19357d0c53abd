"""The pools in the package: `tiny`, a base with experts, and `smollm2`, experts of a real base."""

from pathlib import Path

# A line a message. The experts of both pools were trained on prompts without a chat's marks.
CHAT_TEMPLATE = Path(__file__).parent / "chat.jinja"
