"""Monitors prompts in production: compares rows and answers of a day with the prompt's reference profile."""

from ..evaluation.observations import Observation, observe
from ..evaluation.profile import Profile, record_profile
from .monitor import Monitor
from .report import DriftTest, Report

__all__ = [
    "DriftTest",
    "Monitor",
    "Observation",
    "Profile",
    "Report",
    "observe",
    "record_profile",
]
