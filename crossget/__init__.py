"""CrossGET: cross-guided ensemble of tokens for vision and vision-language transformers.

`with crossget.attach(model, crossget.Ward(r=16)) as attached:` reduces a model, in place, until the end.
"""

from crossget.checkpoints.authors import load_reference
from crossget.core.adapters import Blocks, Tower, register, unregister
from crossget.core.attach import attach, attachment, find_towers, load
from crossget.core.attachment import Attachment
from crossget.measure.doctor import doctor
from crossget.measure.fit import fit_schedule
from crossget.measure.flops import count_flops
from crossget.measure.speed import benchmark
from crossget.methods.diversity import AveragePool, Determinantal, MaxMin
from crossget.methods.merging import unmerge
from crossget.methods.reducers import CrossGET, Random, ToMe, TopK, Ward
from crossget.methods.schedules import Aligned, Keep, Linear, RampedRatio, Ratio

__version__ = "0.1.0"

__all__ = [
    "Aligned",
    "Attachment",
    "AveragePool",
    "Blocks",
    "CrossGET",
    "Determinantal",
    "Keep",
    "Linear",
    "MaxMin",
    "RampedRatio",
    "Random",
    "Ratio",
    "ToMe",
    "TopK",
    "Tower",
    "Ward",
    "attach",
    "attachment",
    "benchmark",
    "count_flops",
    "doctor",
    "find_towers",
    "fit_schedule",
    "load",
    "load_reference",
    "register",
    "unmerge",
    "unregister",
]
