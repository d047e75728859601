"""Prompts: loaders for files, data sets and environments, and the built-in mini tasks."""

from rlalign.tasks.errors import TaskError
from rlalign.tasks.load import load_prompts
from rlalign.tasks.prompt_set import BadRow, LoadReport, PromptSet

__all__ = ["BadRow", "LoadReport", "PromptSet", "TaskError", "load_prompts"]
