"""Reports: the main job from a model and a task to a folder with a report, figures, tables and artifacts."""

from mechattr.report.localise import Localisation, localise, rebuild

__all__ = ["Localisation", "localise", "rebuild"]
