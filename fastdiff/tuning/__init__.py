"""Choices by measurement: what is asked (`question`), finding out (`measure`), the winner (`choice`), and the file that
remembers (`record`). `layers` asks about the forms of a model's layers, `attention` about kernels.

Imports no other room: whoever asks brings the options.
"""

from .attention import PYTORCH, AttentionSize, attention_question
from .choice import choose
from .layers import PLAIN, layer_key, layer_questions
from .question import Option, Outcome, Question
from .record import Answers
from .sizes import input_shapes
from .tuner import Tuner, tuner_of

__all__ = [
    "PLAIN",
    "PYTORCH",
    "Answers",
    "AttentionSize",
    "Option",
    "Outcome",
    "Question",
    "Tuner",
    "attention_question",
    "choose",
    "input_shapes",
    "layer_key",
    "layer_questions",
    "tuner_of",
]
