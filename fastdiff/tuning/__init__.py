"""Choices by measurement: what is asked (`question`), finding out (`measure`), the winner (`choice`), and the file that
remembers (`record`). `layers` asks about the forms of a model's layers.

Imports no other room: whoever asks brings the options.
"""

from .choice import choose
from .layers import PLAIN, layer_key, layer_questions
from .question import Option, Outcome, Question
from .record import Answers
from .sizes import input_shapes
from .tuner import Tuner, tuner_of

__all__ = [
    "PLAIN",
    "Answers",
    "Option",
    "Outcome",
    "Question",
    "Tuner",
    "choose",
    "input_shapes",
    "layer_key",
    "layer_questions",
    "tuner_of",
]
