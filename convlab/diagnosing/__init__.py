"""`diagnose`: a reader's own layer, watched, probed, measured and explained."""

from convlab.diagnosing.causes import Cause
from convlab.diagnosing.diagnosis import Diagnosis, diagnose
from convlab.diagnosing.kind import Kind

__all__ = ["Cause", "Diagnosis", "Kind", "diagnose"]
