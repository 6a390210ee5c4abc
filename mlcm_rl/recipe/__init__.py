"""The recipe: every setting of a run as strict types, and nothing that needs torch.

A recipe has a teacher and a list of stages. `kind` selects the type of a stage; unknown keys are errors. A field marked
with `presentation` cannot change a result (how often to log, where to put files) and stays out of the fingerprint.

Only the types are exported here: `file.py` loads a file into them and reports what is wrong with it. A validator's
message begins with the name of the setting that it is about, so that the error points at that setting's line.
"""

from .adapt_text import AdaptText
from .control import TrainControl
from .distill import Distill
from .evaluation import Evaluate
from .experiment import RESERVED, STUDENTS, TUNING, Recipe, Stage, missing_trackers
from .feedback import Feedback
from .perceptual import TrainPerceptual
from .preference import Dpo, Policy, Tuning
from .stage import OneStage, Training
from .start import Start, StudentSource
from .teacher_stages import TrainTeacher, Trajectories
from .train_reward import TrainReward
from .types import Full, Guard, Lora, Reward, Samples, Strict, Teacher

__all__ = [
    "RESERVED",
    "STUDENTS",
    "TUNING",
    "AdaptText",
    "Distill",
    "Dpo",
    "Evaluate",
    "Feedback",
    "Full",
    "Guard",
    "Lora",
    "OneStage",
    "Policy",
    "Recipe",
    "Reward",
    "Samples",
    "Stage",
    "Start",
    "Strict",
    "StudentSource",
    "Teacher",
    "TrainControl",
    "TrainPerceptual",
    "TrainReward",
    "TrainTeacher",
    "Training",
    "Trajectories",
    "Tuning",
    "missing_trackers",
]
