"""Reports: the main job from a model and a task to a folder with a report, figures, tables and artifacts."""

from mechattr.report.erasing import Erasure, erase
from mechattr.report.localise import Localisation, localise, rebuild
from mechattr.report.steering import Steering, steer
from mechattr.report.vocabulary import Vocabulary, vocabulary

__all__ = ["Erasure", "Localisation", "Steering", "Vocabulary", "erase", "localise", "rebuild", "steer", "vocabulary"]
