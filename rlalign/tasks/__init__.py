"""Prompts: loaders for files, data sets and environments, and the built-in mini tasks."""

from rlalign.tasks.errors import TaskError
from rlalign.tasks.load import load_prompts
from rlalign.tasks.prompt_set import BadRow, LoadReport, PromptSet
from rlalign.tasks.scored import ScoredGroup, ScoredSet, load_scored

__all__ = [
    "BadRow",
    "LoadReport",
    "PromptSet",
    "ScoredGroup",
    "ScoredSet",
    "TaskError",
    "load_prompts",
    "load_scored",
]
