"""Shows where tokens go: a trace as numbers, text, page and picture, and whole tasks as figures."""

from phatgoose.analysis.html import render_html, save_html
from phatgoose.analysis.overview import draw_entropy, draw_overview
from phatgoose.analysis.picture import save_picture
from phatgoose.analysis.report import describe, save_analyses
from phatgoose.analysis.sentence import draw_sentence
from phatgoose.analysis.summary import summarise
from phatgoose.analysis.task_figure import draw_task
from phatgoose.analysis.tasks import TaskAnalysis, analyse_tasks
from phatgoose.analysis.text import render_text
from phatgoose.analysis.tokens import Token, label_sequences, token_table

__all__ = [
    "TaskAnalysis",
    "Token",
    "analyse_tasks",
    "describe",
    "draw_entropy",
    "draw_overview",
    "draw_sentence",
    "draw_task",
    "label_sequences",
    "render_html",
    "render_text",
    "save_analyses",
    "save_html",
    "save_picture",
    "summarise",
    "token_table",
]
