"""Seeing a trace: numbers, text for a terminal, a web page, a picture."""

from phatgoose.analysis.html import render_html, save_html
from phatgoose.analysis.picture import save_picture
from phatgoose.analysis.summary import summarise
from phatgoose.analysis.text import render_text
from phatgoose.analysis.tokens import Token, label_sequences, token_table

__all__ = [
    "Token",
    "label_sequences",
    "render_html",
    "render_text",
    "save_html",
    "save_picture",
    "summarise",
    "token_table",
]
